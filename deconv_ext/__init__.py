"""Transposed 2-D convolution for PyTorch on kernels of its own: a drop-in for nn.ConvTranspose2d.

Importing the package neither compiles nor loads the binary module; the first call does.
"""

from __future__ import annotations

from . import functional
from .build import build_info
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
