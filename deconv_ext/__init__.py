"""Transposed 2-D convolution for PyTorch on kernels of its own: a drop-in for nn.ConvTranspose2d.

Importing the package neither compiles nor loads the binary module; the first call does.
"""

from __future__ import annotations

from . import checkerboard, functional, init, memory, tf, tuning
from .build import build_info
from .conv1d import conv_transpose1d
from .convert import ConversionReport, convert, revert
from .fuse import FusionReport, fuse
from .modules import (
    ConvTranspose1d,
    ConvTranspose2d,
    LazyConvTranspose1d,
    LazyConvTranspose2d,
)
from .tuning import autotune

__version__ = "0.1.0"
__all__ = [
    "ConversionReport",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "FusionReport",
    "LazyConvTranspose1d",
    "LazyConvTranspose2d",
    "__version__",
    "autotune",
    "build_info",
    "checkerboard",
    "conv_transpose1d",
    "convert",
    "functional",
    "fuse",
    "init",
    "memory",
    "revert",
    "tf",
    "tuning",
]
