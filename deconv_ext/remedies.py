"""What helps against checkerboards: other kernels, other weights, another operator."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import functional
from .phases import check_plain, sides, tap_table


@dataclasses.dataclass(frozen=True)
class Widening:
    """A kernel that is a multiple of the stride, and how to place the old one in it.

    `kernel_size`, `padding` and `output_padding` are arguments of the new layer, (h, w) each; the
    output has the same size as before. `before` and `after` count the zeros (h, w) to add at the
    beginning and at the end of the old kernel for a layer that computes the same function.
    """

    kernel_size: functional.Pair
    padding: functional.Pair
    output_padding: functional.Pair
    before: functional.Pair
    after: functional.Pair


def suggest(kernel: Any, stride: Any, padding: Any = 0, output_padding: Any = 0) -> Widening:
    """The next larger kernel that is a multiple of the stride, so that all phases have equal taps.

    Of the taps that are added, so many come at the end as output_padding can pay for, and the rest
    on both sides; a tap at the beginning costs one row of padding. With z taps to add, a of them
    at the beginning,

        padding' = padding + a,   output_padding' = output_padding - z + 2 * a

    and a is the smallest number that leaves output_padding' >= 0.

    Args:
        kernel, stride, padding, output_padding: an int, or one for each of (h, w). The dilation
            must be 1.

    Raises:
        ValueError: a kernel or stride below 1.
    """
    columns = []
    for k, s, p, extra in zip(
        functional.pair("kernel", kernel),
        functional.pair("stride", stride),
        functional.pair("padding", padding),
        functional.pair("output_padding", output_padding),
    ):
        if k < 1 or s < 1:
            raise ValueError(
                f"kernel and stride must be at least 1, but got kernel={kernel}, stride={stride}"
            )
        added = -k % s
        before = max(0, -(-(added - extra) // 2))
        columns.append((k + added, p + before, extra - added + 2 * before, before, added - before))
    return Widening(*zip(*columns))


@torch.no_grad()
def widen(layer: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """A copy of the layer with the kernel that `suggest` gives, and the same function.

    The new taps are zero: train on (fine-tune) to let them take part. A layer whose kernel is a
    multiple of the stride is merely copied.

    Raises:
        ValueError: the layer is dilated or its weight is parametrized.
    """
    check_plain(layer, "widen")
    if layer.dilation != (1, 1):
        raise ValueError(f"widen needs dilation=1, but got dilation={layer.dilation}")
    (top, bottom, left, right), extra = sides(layer)
    new = suggest(layer.kernel_size, layer.stride, (top, left), extra)
    wide = copy.deepcopy(layer)
    if new.kernel_size == layer.kernel_size:
        return wide
    margins = (new.before[1], new.after[1], new.before[0], new.after[0])
    wide.weight = nn.Parameter(
        nn.functional.pad(layer.weight, margins), requires_grad=layer.weight.requires_grad
    )
    wide.kernel_size, wide.output_padding = new.kernel_size, new.output_padding
    if top == bottom and left == right:
        wide.padding = new.padding
    else:  # only our layer can be told this
        two_sided: Any = (
            (new.padding[0], bottom + new.before[0]),
            (new.padding[1], right + new.before[1]),
        )
        wide.padding = two_sided
    return wide


@torch.no_grad()
def to_subpixel(layer: nn.ConvTranspose2d) -> nn.Sequential:
    """The same function as a 1x1 convolution and a pixel shuffle (sub-pixel convolution).

    With kernel = stride = r the patches of neighbouring input pixels touch without overlap: phase
    (a, b) is a 1x1 convolution with the taps (a, b), and `nn.PixelShuffle(r)` interleaves phases.

        convolution.weight[co * r * r + a * r + b, ci] = layer.weight[ci, co, a, b]

    Raises:
        ValueError: kernel and stride differ or are not square, there is padding, output_padding or
            dilation, or the weight is parametrized.
    """
    check_plain(layer, "to_subpixel")
    r = layer.stride[0]
    exact = (
        layer.kernel_size == layer.stride == (r, r)
        and layer.dilation == (1, 1)
        and sides(layer) == ((0, 0, 0, 0), (0, 0))
    )
    if not exact:
        raise ValueError(
            f"to_subpixel needs kernel_size == stride, square, without padding, output_padding "
            f"and dilation, but got {layer}"
        )
    bias = layer.bias
    convolution = nn.Conv2d(
        layer.in_channels,
        layer.out_channels * r * r,
        1,
        groups=layer.groups,
        bias=bias is not None,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    # [g, C_in/g, C_out/g, r, r] to [g, C_out/g, r, r, C_in/g]
    grouped = layer.weight.unflatten(0, (layer.groups, -1)).movedim(1, -1)
    convolution.weight.copy_(grouped.reshape(convolution.weight.shape))
    if bias is not None and convolution.bias is not None:
        convolution.bias.copy_(bias.repeat_interleave(r * r))
    return nn.Sequential(convolution, nn.PixelShuffle(r)).train(layer.training)


class _OverlapNormalization(nn.Module):
    """A parametrization: the weight divided by how many taps meet, relative to the mean."""

    scale: Tensor

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        scales = []
        for k, s, d in zip(layer.kernel_size, layer.stride, layer.dilation):
            phase = tap_table(k, s, dilation=d)[0]
            scales.append((k / s) / phase.bincount(minlength=s)[phase])
        self.register_buffer("scale", torch.outer(*scales).to(layer.weight), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


def normalize_overlap(layer: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Let the layer divide by the overlap: equal weights then give equal outputs in all phases.

    Where n taps meet at an output pixel (`checkerboard.overlap_map`), their weights are multiplied
    by mean(n) / n. This is done for pixels inside; at the border, where neighbours are missing,
    the output fades as always. Registers a parametrization of the weight, in place, and returns
    the layer: training goes on with the parameter as it is, and
    `torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")` folds the factors in.

    Raises:
        ValueError: the weight is parametrized already.
    """
    check_plain(layer, "normalize_overlap")
    parametrize.register_parametrization(layer, "weight", _OverlapNormalization(layer))
    return layer
