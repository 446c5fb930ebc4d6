"""Makes shared libraries that stand for CANN's, so that the real torch_npu wheel can be imported without them.

torch_npu links against a handful of CANN libraries (libhccl, libascendcl, ...). Only plain C functions are missing
from them: each becomes a function that returns an error code, but for the few that are asked during import. Nothing
can be computed with these; the dispatcher's registrations, the schemas and the meta kernels are the wheel's own.

    python -m contract.stubs DIRECTORY     prints the folder to put into LD_LIBRARY_PATH
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

# What import and tracing ask for: an initialisation that succeeds, no device (one with STUB_DEVICES, since
# device guards stand around operators on fake tensors too), 0 as the current one, a SoC name.
ANSWERS = {
    "aclInit": "int aclInit(const char* path) { return 0; }",
    "aclFinalize": "int aclFinalize(void) { return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int* device) { *device = 0; return 0; }",
    "aclrtSetDevice": "int aclrtSetDevice(int device) { return 0; }",
    "aclrtGetDeviceCount": (
        'int aclrtGetDeviceCount(unsigned* count) { *count = getenv("STUB_DEVICES") ? 1 : 0; return 0; }'
    ),
    "aclrtGetSocName": (
        'const char* aclrtGetSocName(void) { const char* soc = getenv("STUB_SOC"); return soc ? soc : "Ascend910B1"; }'
    ),
    "aclGetRecentErrMsg": 'const char* aclGetRecentErrMsg(void) { return "no CANN here: a stub"; }',
    # CUDA's, of a torch from PyPI for x86: no device is there (cudaErrorNoDevice).
    "cudaGetDeviceCount": "int cudaGetDeviceCount(int* count) { *count = 0; return 100; }",
    "cudaGetErrorString": 'const char* cudaGetErrorString(int code) { return "no CUDA here: a stub"; }',
    "cudaGetErrorName": 'const char* cudaGetErrorName(int code) { return "stub"; }',
}
FAILURE = 507000  # ACL's internal error: whoever calls a stub for real sees that it failed
SYSTEM = ("libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2")


def needed_libraries(binary: Path) -> list[str]:
    """The DT_NEEDED names of a shared library."""
    lines = _run("readelf", "-d", str(binary)).splitlines()
    return [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]


def undefined(binary: Path) -> set[str]:
    return {line.split()[-1].split("@")[0] for line in _run("nm", "-D", "--undefined-only", str(binary)).splitlines()}


def defined(binaries: Iterable[Path]) -> set[str]:
    found = set()
    for binary in binaries:
        lines = _run("nm", "-D", "--defined-only", str(binary)).splitlines()
        found |= {line.split()[-1].split("@")[0] for line in lines}
    return found


def build(site: Path, out: Path) -> Path:
    """Stub libraries for the torch_npu that lies in `site`; returns their folder. Needs gcc, nm and readelf."""
    out.mkdir(parents=True, exist_ok=True)
    package = site / "torch_npu"
    own = [p for p in (*package.glob("lib/*.so"), *package.glob("_C*.so")) if "op_plugin_atb" not in p.name]
    torch_folder = _torch_folder(site)
    torch_libs = list((torch_folder / "lib").glob("*.so*"))
    if torch_folder.parent == site:  # a torch of PyPI beside torch_npu: its CUDA libraries are missing too
        own += torch_libs
    bundled = [*package.glob("lib/*.so"), *site.glob("torch_npu.libs/*.so*"), *torch_libs]
    system = [Path(p) for name in SYSTEM if (p := _system_library(name))]
    names = {p.name for p in (*bundled, *system)}
    missing_libraries = sorted({name for p in own for name in needed_libraries(p)} - names - set(SYSTEM))
    missing_libraries = [name for name in missing_libraries if not _system_library(name)]
    wanted = set().union(*(undefined(p) for p in own)) - defined([*bundled, *own, *system])
    functions = sorted(n for n in wanted if not n.startswith(("_Z", "Py", "_Py", "_ITM", "__gmon", "__cxa")))
    source = out / "stubs.c"
    lines = ["#include <stdlib.h>"]
    for name in functions:
        code = 0 if name.startswith("Msprof") else FAILURE
        lines.append(ANSWERS.get(name) or f"long {name}(void) {{ return {code}; }}")
    source.write_text("\n".join(lines) + "\n")
    everything = out / "libcannstubs.so"
    _run("gcc", "-shared", "-fPIC", "-o", str(everything), str(source))
    for library in missing_libraries:  # each is an empty library that brings the stubs along
        _run("gcc", "-shared", "-fPIC", "-o", str(out / library), "-x", "c", "/dev/null", "-Wl,--no-as-needed",
             f"-L{out}", "-lcannstubs", f"-Wl,-rpath,{out}", f"-Wl,-soname,{library}")  # fmt: skip
    print(f"{len(functions)} functions in {len(missing_libraries)} libraries", file=sys.stderr)
    return out


def _torch_folder(site: Path) -> Path:
    """torch may lie beside torch_npu or come from another folder of the path; it isn't imported to find out."""
    for entry in [site, *map(Path, sys.path)]:
        if (entry / "torch" / "lib").is_dir():
            return entry / "torch"
    raise FileNotFoundError("torch isn't installed")


def _system_library(name: str) -> str | None:
    for folder in ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/lib/aarch64-linux-gnu"):
        if os.path.exists(f"{folder}/{name}"):
            return f"{folder}/{name}"
    return None


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    print(build(Path(sysconfig.get_paths()["purelib"]), Path(sys.argv[1])))
