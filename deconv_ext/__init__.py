"""Transposed 2-D convolution for PyTorch on kernels of its own: a drop-in for nn.ConvTranspose2d.

Importing the package neither compiles nor loads the binary module; the first call does.
"""

from __future__ import annotations

from typing import Any

from . import functional
from .convert import ConversionReport, convert, revert
from .modules import ConvTranspose2d

__version__ = "0.1.0"
__all__ = [
    "ConversionReport",
    "ConvTranspose2d",
    "__version__",
    "build_info",
    "convert",
    "functional",
    "revert",
]


def build_info() -> dict[str, Any]:
    """Version, how the binary module was built, compilers, instruction set in use, CUDA, OpenMP.

    Loads the binary module, building it if need be.
    """
    from .build import build_info

    return build_info()
