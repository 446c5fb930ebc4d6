"""Lowers a Triton kernel for an Ascend chip without one: triton-ascend to linalg, then bishengir-compile (PyPI package
ascendnpu-ir) through all its passes, which plan the real on-chip memory.

The last step, from the finished module to a binary, is a program `hivmc` that the package lacks. A stand-in for it is
put on the PATH: it keeps the module it is handed, which shows that every pass before it succeeded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from triton._C.libtriton import ir
from triton.backends.ascend import compiler
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource

OPTIONS = (
    "--enable-auto-multi-buffer=true", "--enable-auto-bind-sub-block=true", "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true",
)  # fmt: skip
STAND_IN = """#!/bin/sh
case "$*" in *--version*) echo "stand-in"; exit;; esac
cp "$1" "$HIVMC_KEEPS"
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


class Lowered(NamedTuple):
    """`problem` is the compiler's first complaint, None where it lowered. `units`: which cores (aiv: vector, mix: cube
    and vector). `spec`: the chip's description that the compiler went by."""

    problem: str | None
    units: str
    spec: dict[str, int]


def lower(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], soc: str) -> Lowered:
    """Lower a @triton.jit function with arguments of the named types, '*bf16' or 'i32', for a SoC."""
    linalg, units = to_linalg(kernel, arguments, constants, soc)
    program = "bishengir-compile-a5" if "950" in soc else "bishengir-compile"
    binary = Path(sysconfig.get_paths()["purelib"]) / "ascendnpuir" / "bin" / program
    with tempfile.TemporaryDirectory() as folder:
        for name in ("hivmc", "hivmc-a5"):
            stand_in = Path(folder, name)
            stand_in.write_text(STAND_IN)
            stand_in.chmod(0o755)
        source, kept = Path(folder, "kernel.mlir"), Path(folder, "finished.mlir")
        source.write_text(linalg)
        environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HIVMC_KEEPS": str(kept)}
        ended = subprocess.run(
            [binary, source, f"--target={soc}", *OPTIONS, "-o", f"{folder}/kernel.o"],
            capture_output=True, text=True, env=environment,
        )  # fmt: skip
        said = ended.stdout + ended.stderr
        finished = kept.read_text() if kept.exists() else ""
    # It tries again without overlapping loads where memory is short, and then succeeds: tiles are to fit without that.
    complaints = [line for line in said.splitlines() if re.search(r"error|overflow", line, re.IGNORECASE)]
    problem = None
    if complaints:
        causes = [line for line in complaints if "Failed to run" not in line]
        problem = (causes or complaints)[-1].strip()
    elif ended.returncode or f"@{kernel.__name__}" not in finished:
        problem = f"exit status {ended.returncode}, {len(finished)} characters of finished module: {said[-200:]}"
    return Lowered(problem, units, _spec(finished))


def to_linalg(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], soc: str) -> tuple[str, str]:
    """triton-ascend's part: the kernel in linalg, and the cores it is for."""
    backend = compiler.AscendBackend(GPUTarget("npu", soc, 0))
    options = backend.parse_options({"compile_on_910_95": "950" in soc})
    context = ir.context()
    ir.load_dialects(context)
    metadata = {"target": backend.target, "hash": "0", **vars(options)}
    # Triton takes the types by their order.
    in_order = {name: arguments[name] for name in kernel.arg_names if name not in constants}
    source = ASTSource(kernel, in_order, constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options)
    linalg = stages["ttadapter"](stages["ttir"](module, metadata), metadata)
    linalg, metadata = compiler._parse_linalg_metadata(linalg, metadata)
    return linalg, str(metadata["mix_mode"])


def _spec(module: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r'#dlti\.dl_entry<"(\w+)", (\d+) : i32>', module)}
