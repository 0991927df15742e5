"""The phases of a transposed convolution, as tensors: which taps meet at which output pixels.

On each axis, tap k of input pixel i lands on output pixel

    o = i * stride + k * dilation - padding

so tap k always serves the outputs with o mod stride = (k * dilation - padding) mod stride, its
*phase*. Seen from one phase, the taps k and k + stride / gcd(stride, dilation) are neighbours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from . import functional


def tap_table(kernel: int, stride: int, padding: int = 0, dilation: int = 1) -> tuple[Tensor, ...]:
    """(phase, position) of every tap of an axis: int64 [kernel] each.

    `phase` is the remainder of the output pixels that the tap serves; `position` numbers the taps
    of that phase from 0.
    """
    tap = torch.arange(kernel)
    return (
        (tap * dilation - padding) % stride,
        tap // (stride // math.gcd(stride, dilation)),
    )


def split(weight: Tensor, stride: Any, padding: Any = 0, dilation: Any = 1) -> Tensor:
    """The sub-kernels of all phases.

    Args:
        weight: [..., kH, kW].
        stride, padding, dilation: an int, or one for each of (h, w); of the padding only what is
            cropped at the top and at the left matters.

    Returns:
        [sH, sW, ..., mH, mW], where m is the largest number of taps that a phase can have; phases
        with fewer taps are filled up with zeros.
    """
    for axis, s, p, d in zip(
        (-2, -1),
        functional.pair("stride", stride),
        functional.pair("padding", padding),
        functional.pair("dilation", dilation),
    ):
        phase, position = (
            table.to(weight.device) for table in tap_table(weight.shape[axis], s, p, d)
        )
        taps = weight.movedim(axis, 0)
        parts = taps.new_zeros(s, int(position.max()) + 1, *taps.shape[1:])
        parts = parts.index_put((phase, position), taps)
        # The phases go in front: [sH, ...] after the first axis, [sW, sH, ...] after the second.
        weight = parts.movedim(1, axis)
    return weight.transpose(0, 1)


def layers(model: nn.Module) -> list[tuple[str, nn.ConvTranspose2d]]:
    """The transposed convolutions of a model with their names, ours and torch's.

    Raises:
        ValueError: there is none, or one that is lazy and has no weight yet.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ConvTranspose2d)]
    if not found:
        raise ValueError(f"expected a model with an nn.ConvTranspose2d, but got {model}")
    for name, layer in found:
        if isinstance(layer, LazyModuleMixin) and layer.has_uninitialized_params():
            raise ValueError(f"layer {name!r} is lazy: run the model once before")
    return found


def top_left(layer: nn.ConvTranspose2d) -> tuple[int, int]:
    """(top, left) padding of a layer, however its padding is written."""
    (top, _, left, _), _ = sides(layer)
    return top, left


def sides(layer: nn.ConvTranspose2d) -> tuple[functional.Sides, functional.Pair]:
    """(top, bottom, left, right) padding and the output_padding of a layer."""
    return functional.resolve_padding(
        layer.padding,
        layer.weight.shape,
        functional.pair("stride", layer.stride),
        functional.pair("output_padding", layer.output_padding),
        functional.pair("dilation", layer.dilation),
    )


def split_layer(layer: nn.ConvTranspose2d) -> Tensor:
    """The sub-kernels [sH, sW, C_in, C_out/groups, mH, mW] of a layer, without gradient."""
    return split(layer.weight.detach(), layer.stride, top_left(layer), layer.dilation)


def check_plain(layer: Any, purpose: str) -> None:
    """The layer is a transposed convolution that owns its weight; otherwise an error."""
    if not isinstance(layer, nn.ConvTranspose2d):
        raise TypeError(
            f"{purpose} needs an nn.ConvTranspose2d, but got layer={type(layer).__name__}"
        )
    if parametrize.is_parametrized(layer, "weight"):
        raise ValueError(
            f"{purpose} needs a layer that owns its weight, but the weight of {layer} is "
            f"parametrized: do this first, or call torch.nn.utils.parametrize."
            f"remove_parametrizations before"
        )
