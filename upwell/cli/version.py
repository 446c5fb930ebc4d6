"""upwell --version"""

from __future__ import annotations

import platform

import torch

import upwell
from upwell.devices import resolve_device
from upwell.ops.native import describe as kernels


def describe() -> str:
    """Version, torch, the device that 'auto' means here, and the kernels in use."""
    return (
        f"upwell {upwell.__version__} · Python {platform.python_version()} · torch {torch.__version__} · "
        f"device {resolve_device('auto')} · {kernels()}"
    )
