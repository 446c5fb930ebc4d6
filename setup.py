"""Builds the CPU kernels where a C++ compiler is there; without one the install is pure Python and still complete."""

from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "upwell.ops._kernels",  # a plain C library for ctypes: no Python or torch headers
            sources=sorted(str(p) for p in Path("csrc").glob("*.cpp")),
            depends=sorted(str(p) for p in Path("csrc").glob("*.h")),
            extra_compile_args=[
                "-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
                "-fvisibility-inlines-hidden", "-fwrapv",
            ],
            language="c++",
            optional=True,
        )
    ]
)
