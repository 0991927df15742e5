"""Initial weights for transposed convolutions, which the functions of torch.nn.init get wrong.

They read a weight [C_in, C_out/groups, kH, kW] as one of a convolution: input and output channels
are exchanged then, and the stride is not known at all. So these functions take the layer, ours or
torch's. Each changes it in place, sets its bias to zero and returns it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from .phases import check_plain, tap_table


def fans(layer: nn.ConvTranspose2d) -> tuple[float, float]:
    """(fan_in, fan_out): how many products make an output pixel, and use an input pixel.

        fan_in  = C_in / groups * kH * kW / (sH * sW)
        fan_out = C_out / groups * kH * kW

    An output pixel meets the taps of one phase only, on average one in sH * sW. `torch.nn.init`
    takes C_out / groups * kH * kW for the fan_in.
    """
    taps = layer.kernel_size[0] * layer.kernel_size[1]
    fan_in = layer.in_channels / layer.groups * taps / (layer.stride[0] * layer.stride[1])
    return fan_in, layer.out_channels / layer.groups * taps


@torch.no_grad()
def kaiming_(
    layer: nn.ConvTranspose2d,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> nn.ConvTranspose2d:
    """Normally distributed weights that keep the variance (He et al. 2015, arXiv:1502.01852).

    The standard deviation is gain / sqrt(fan), with the fans of a transposed convolution. Where
    the kernel is no multiple of the stride this holds on average over the phases.

    Args:
        layer: the transposed convolution.
        a, nonlinearity: of what comes before the layer; as in `torch.nn.init.calculate_gain`.
        mode: "fan_in" keeps the variance of outputs, "fan_out" that of gradients.
        generator: for the random numbers.

    Raises:
        ValueError: an unknown mode or nonlinearity, or a parametrized weight.
    """
    check_plain(layer, "kaiming_")
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', but got mode={mode!r}")
    fan = fans(layer)[mode == "fan_out"]
    gain = nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    layer.weight.normal_(0, gain / math.sqrt(fan), generator=generator)
    return _without_bias(layer)


@torch.no_grad()
def icnr_(
    layer: nn.ConvTranspose2d,
    a: float = 0.0,
    nonlinearity: str = "leaky_relu",
    generator: torch.Generator | None = None,
) -> nn.ConvTranspose2d:
    """Random weights, the same for all phases: no checkerboard at the start of training.

    One sub-kernel W [C_in, C_out/groups, mH, mW] with m = ceil(kernel / stride) is drawn as in
    `kaiming_`, and every phase gets it: w[k] = W[k // stride]. What is exact:

    * kernel = m * stride: the output is the nearest-neighbour enlargement of the transposed
      convolution of the input with W and stride 1, cropped by the padding. With m = 1 that is the
      enlarged 1x1 convolution, and all kH * kW taps of a pair of channels are equal.
    * Other kernels >= stride: phases that have a tap less add the weight of the one they lack to
      their last. The response to a constant input is the same in every phase; more is impossible.
    * dilation > 1 and coprime to the stride: also the constant response.

    The idea is that of Aitken et al. 2017 (arXiv:1707.02937) for sub-pixel convolution.

    Raises:
        ValueError: some phase has no tap at all (kernel < stride, or stride and dilation have a
            common divisor), or the weight is parametrized.
    """
    check_plain(layer, "icnr_")
    indices = []
    for kernel, stride, dilation in zip(layer.kernel_size, layer.stride, layer.dilation):
        if kernel < stride or math.gcd(stride, dilation) > 1:
            raise ValueError(
                f"icnr_ needs a tap in every phase: kernel_size >= stride, and a dilation coprime "
                f"to it; but got kernel_size={layer.kernel_size}, stride={layer.stride}, "
                f"dilation={layer.dilation}"
            )
        indices.append(tap_table(kernel, stride, dilation=dilation)[1])
    size = [int(position.max()) + 1 for position in indices]
    std = nn.init.calculate_gain(nonlinearity, a)  # type: ignore[arg-type]
    std /= math.sqrt(layer.in_channels / layer.groups * size[0] * size[1])
    part = torch.empty(*layer.weight.shape[:2], *size, dtype=torch.float64).normal_(
        0, std, generator=generator
    )
    for axis, (position, stride) in enumerate(zip(indices, layer.stride), start=2):
        whole = part.index_select(axis, position)
        if short := len(position) % stride:  # so many phases have a tap more than the others
            lacking = whole.narrow(axis, len(position) - stride, stride - short)
            lacking += part.narrow(axis, -1, 1)
        part = whole
    layer.weight.copy_(part)
    return _without_bias(layer)


@torch.no_grad()
def bilinear_(layer: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """Bilinear interpolation of every channel, as in the heads of FCN (arXiv:1411.4038).

    On each axis w[k] = max(0, 1 - |k - (kernel - 1) / 2| / stride), a triangle; between different
    channels the weight is zero. groups = 1 gives a dense weight with a diagonal, groups = channels
    the depthwise one. With kernel = 2 * stride - stride % 2 and padding = (kernel - stride) / 2 the
    result is `F.interpolate(x, scale_factor=stride, mode="bilinear", align_corners=False)`, except
    at the border, where that repeats pixels and this adds zeros. Other kernels >= 2 * stride - 1
    interpolate too, at places shifted by a part of a pixel.

    Raises:
        ValueError: input and output channels differ in number, the kernel is too small for the
            triangle, there is a dilation, or the weight is parametrized.
    """
    check_plain(layer, "bilinear_")
    if layer.in_channels != layer.out_channels:
        raise ValueError(
            f"bilinear_ needs as many output channels as input channels, but got "
            f"in_channels={layer.in_channels}, out_channels={layer.out_channels}"
        )
    if layer.dilation != (1, 1):
        raise ValueError(f"bilinear_ needs dilation=1, but got dilation={layer.dilation}")
    triangles = []
    for kernel, stride in zip(layer.kernel_size, layer.stride):
        if kernel < 2 * stride - 1:
            raise ValueError(
                f"bilinear_ needs kernel_size >= 2 * stride - 1 "
                f"(best {2 * stride - stride % 2} for stride={stride}), "
                f"but got kernel_size={layer.kernel_size}"
            )
        distance = (torch.arange(kernel, dtype=torch.float64) - (kernel - 1) / 2).abs()
        triangles.append((1 - distance / stride).clamp(min=0))
    channel = torch.arange(layer.in_channels, device=layer.weight.device)
    layer.weight.zero_()
    layer.weight[channel, channel % layer.weight.shape[1]] = torch.outer(*triangles).to(
        layer.weight
    )
    return _without_bias(layer)


def _without_bias(layer: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    if layer.bias is not None:
        layer.bias.zero_()
    return layer
