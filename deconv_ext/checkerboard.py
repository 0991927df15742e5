"""Checkerboards: where they come from, how strong they are, and what helps.

Outputs of a transposed convolution fall into stride x stride phases, and each phase has taps of its
own. Two things can make phases differ on an even input, and the difference repeats with the
stride:

* geometry: where the kernel is no multiple of the stride, some phases have more taps than others
  (Odena et al. 2016, doi:10.23915/distill.00003): `overlap_map`, `unevenness`;
* weights: taps of different phases are independent numbers, at the start of training and after:
  `dc_share` of a layer, `spectral_share` of an image.

`diagnose` measures both for every layer of a model and names a remedy: `suggest` and `widen`,
`normalize_overlap`, `to_subpixel` (here), or an initialisation (`deconv_ext.init`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, report
from .phases import layers, sides, split, split_layer, top_left
from .remedies import Widening, normalize_overlap, suggest, to_subpixel, widen

__all__ = [
    "Diagnosis",
    "LayerDiagnosis",
    "LowRankReport",
    "Widening",
    "dc_share",
    "diagnose",
    "low_rank_report",
    "normalize_overlap",
    "overlap_map",
    "phase_gains",
    "spectral_share",
    "suggest",
    "to_subpixel",
    "unevenness",
    "widen",
]

#: A periodic pattern with less than this share of the energy (a tenth of the amplitude) passes.
TOLERANCE = 0.01


def overlap_map(
    kernel: Any,
    stride: Any,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    size: Any = 6,
) -> Tensor:
    """How many taps meet at each output pixel: int64 [OH, OW], for an input of `size` pixels.

    All arguments are an int, or one for each of (h, w); `padding` in any form that
    `functional.conv_transpose2d` takes.
    """
    height, width = functional.pair("size", size)
    kernel_h, kernel_w = functional.pair("kernel", kernel)
    return functional.conv_transpose2d(
        torch.ones(1, 1, height, width, dtype=torch.int64),
        torch.ones(1, 1, kernel_h, kernel_w, dtype=torch.int64),
        None,
        stride,
        padding,
        output_padding,
        1,
        dilation,
    )[0, 0]


def unevenness(kernel: Any, stride: Any, dilation: Any = 1) -> float:
    """How uneven the overlap is: standard deviation over mean of the taps per phase.

    0 exactly where the kernel is a multiple of the stride (and the dilation coprime to it).
    """
    ones = torch.ones(functional.pair("kernel", kernel), dtype=torch.float64)
    taps = split(ones, stride, 0, dilation).sum(dim=(-2, -1))
    return float(taps.std(correction=0) / taps.mean())


def phase_gains(layer: nn.ConvTranspose2d) -> Tensor:
    """The response to constant inputs by phase: [sH, sW], root mean square over channel pairs.

    Divided by its own mean over the phases, so 1 everywhere if the phases are equally strong.
    """
    rms = split_layer(layer).double().sum(dim=(-2, -1)).square().mean(dim=(2, 3)).sqrt()
    return rms / rms.mean()


def dc_share(layer: nn.ConvTranspose2d) -> float:
    """The part of the response to constant inputs that is a checkerboard: 0 to 1.

    With D[r] the sum of the taps of phase r, for every pair of channels, this is

        1 - |mean over r of D[r]|^2 / mean over r of |D[r]|^2

    By Parseval's theorem, the share of the response's energy that lies at the non-zero multiples
    of 1/stride. It is 0 if all phases respond alike, and about 1 - 1 / phases for independent
    random taps.
    """
    response = split_layer(layer).double().sum(dim=(-2, -1))
    energy = response.square().mean(dim=(0, 1)).sum()
    if energy == 0:
        return 0.0
    return max(0.0, 1 - float(response.mean(dim=(0, 1)).square().sum() / energy))


def spectral_share(image: Tensor, stride: Any) -> float:
    """The share of an image's variance that repeats with the stride: 0 to 1.

    That is the energy of its discrete Fourier transform at the non-zero multiples of 1/stride
    (cycles per pixel, on both axes) over the energy at all frequencies but zero, and equal to the
    variance of the means of the phases over the variance of the image. Noise of P pixels has about
    stride^2 / P by chance.

    Args:
        image: [..., H, W]; channels and samples are summed over. Only whole periods count: the
            last H % stride rows and W % stride columns are left out.
        stride: an int, or one for each of (h, w).

    Raises:
        ValueError: an image smaller than one period.
    """
    step_h, step_w = functional.pair("stride", stride)
    rows, columns = image.shape[-2] // step_h, image.shape[-1] // step_w
    if not rows or not columns:
        raise ValueError(f"expected an image of at least {stride} pixels, got {image.shape}")
    image = image.detach()[..., : rows * step_h, : columns * step_w].double()
    image = image - image.mean(dim=(-2, -1), keepdim=True)
    phases = image.unflatten(-1, (columns, step_w)).unflatten(-3, (rows, step_h)).mean(dim=(-4, -2))
    total = image.square().mean(dim=(-2, -1)).sum()
    return float(phases.square().mean(dim=(-2, -1)).sum() / total) if total > 0 else 0.0


# --- reports -------------------------------------------------------------------------------------


@dataclasses.dataclass
class LayerDiagnosis:
    """One transposed convolution. Shares are of energy, 0 to 1."""

    name: str
    arguments: str
    stride: tuple[int, ...]
    unevenness: float  # of the overlap: geometry alone
    gains: Tensor  # [sH, sW], see `phase_gains`
    dc_share: float  # of the response to constant inputs: geometry and weights
    impulse: Tensor  # [kH, kW], response to one pixel: root mean square over pairs of channels
    output_share: float | None = None  # of the layer's output for the sample
    output: Tensor | None = None  # [C_out, OH, OW] for the first image of the sample
    verdict: str = ""
    remedy: str = ""


@dataclasses.dataclass
class Diagnosis:
    """What `diagnose` found, one row a layer; prints as a table."""

    layers: list[LayerDiagnosis]

    def __str__(self) -> str:
        rows = [("layer", "arguments", "overlap", "phase gains", "DC", "output", "verdict")]
        for layer in self.layers:
            low, high = float(layer.gains.min()), float(layer.gains.max())
            share = "" if layer.output_share is None else f"{layer.output_share:.2%}"
            dc = f"{layer.dc_share:.2%}"
            rows.append(
                (
                    layer.name or "(the model)",
                    layer.arguments,
                    f"{layer.unevenness:.3f}",
                    f"{low:.2f}..{high:.2f}",
                    dc,
                    share,
                    layer.verdict,
                )
            )
        return report.table(
            rows,
            "overlap: standard deviation / mean of the taps that meet, over the phases",
            "DC, output: share of the energy at the multiples of 1/stride",
            *(
                f"{layer.name or '(the model)'}: {layer.remedy}"
                for layer in self.layers
                if layer.remedy
            ),
        )


def diagnose(model: nn.Module, sample: Any = None) -> Diagnosis:
    """Measure the checkerboards of every transposed convolution of a model, ours or torch's.

    Args:
        model: a module, which may itself be a transposed convolution.
        sample: an input of the model: a tensor, a tuple of arguments or a dict of keywords. With
            it the model runs once, in eval mode and without gradients, and the report says how
            much of every layer's output repeats with the stride.

    Raises:
        ValueError: the model has no transposed convolution, or a lazy one.
    """
    outputs: dict[str, Tensor] = {}
    found = layers(model)
    if sample is not None:
        handles = [layer.register_forward_hook(_keep(outputs, name)) for name, layer in found]
        try:
            report.run(model, sample)
        finally:
            for handle in handles:
                handle.remove()
    return Diagnosis([_examine(name, layer, outputs.get(name)) for name, layer in found])


def _keep(outputs: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[name] = output.detach()

    return hook


def _examine(name: str, layer: nn.ConvTranspose2d, output: Tensor | None) -> LayerDiagnosis:
    result = LayerDiagnosis(
        name,
        layer.extra_repr(),
        tuple(layer.stride),
        unevenness(layer.kernel_size, layer.stride, layer.dilation),
        phase_gains(layer),
        dc_share(layer),
        layer.weight.detach().double().square().mean(dim=(0, 1)).sqrt(),
    )
    if output is not None:
        result.output = output.reshape(-1, *output.shape[-3:])[0]
        result.output_share = spectral_share(_inside(layer, output), layer.stride)
    result.verdict, result.remedy = _judge(layer, result)
    return result


def _inside(layer: nn.ConvTranspose2d, output: Tensor) -> Tensor:
    """The output without the border where taps find no input, as far as two periods are left."""
    for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation)):
        size, margin = output.shape[axis - 2], d * (k - 1)
        if size - 2 * margin >= 2 * s:
            output = output.narrow(axis - 2, margin, size - 2 * margin)
    return output


def _judge(layer: nn.ConvTranspose2d, result: LayerDiagnosis) -> tuple[str, str]:
    """(verdict, remedy) in words."""
    (step_h, step_w), (kernel_h, kernel_w) = layer.stride, layer.kernel_size
    if (step_h, step_w) == (1, 1):
        return "stride 1: a single phase, no checkerboard", ""
    ones = torch.ones(kernel_h, kernel_w)
    taps = split(ones, layer.stride, top_left(layer), layer.dilation).sum(dim=(-2, -1))
    if holes := int((taps == 0).sum()):
        return (
            f"holes: {holes} of {taps.numel()} phases have no tap and receive only the bias",
            "take a kernel of at least the stride, and a dilation coprime to it",
        )
    seen = result.dc_share if result.output_share is None else result.output_share
    strong = "a visible pattern" if seen > TOLERANCE else "no visible pattern now"
    if result.unevenness > 0:
        remedy = "normalize_overlap(layer), or a kernel that is a multiple of the stride"
        if layer.dilation == (1, 1):
            padding, extra = sides(layer)
            new = suggest(layer.kernel_size, layer.stride, (padding[0], padding[2]), extra)
            remedy = (
                f"widen(layer) makes it kernel_size={new.kernel_size} with the same function, to "
                f"train on; or normalize_overlap(layer)"
            )
        counts = f"{int(taps.min())} to {int(taps.max())}"
        return f"uneven overlap, {counts} taps meet: {strong}", remedy
    if seen > TOLERANCE:
        return (
            "even overlap, but the weights of the phases differ: a visible pattern",
            "init.icnr_(layer) before training starts every phase with the same weights",
        )
    return "even", ""


@dataclasses.dataclass
class LowRankReport:
    """Effective ranks of the phases' weights; prints as a table.

    `layers` holds (name, phases, effective rank, share of the energy in the first singular value).
    """

    layers: list[tuple[str, int, float, float]]

    def __str__(self) -> str:
        rows = [("layer", "phases", "effective rank", "energy of the first")]
        for name, phases, rank, share in self.layers:
            rows.append((name or "(the model)", str(phases), f"{rank:.2f}", f"{share:.1%}"))
        return report.table(rows)


def low_rank_report(model: nn.Module) -> LowRankReport:
    """How redundant the phases of every transposed convolution are.

    The sub-kernels of a layer are the rows of a matrix [phases, C_in * C_out/groups * taps]. With
    its singular values s and p = s / sum(s), the effective rank is exp(-sum of p log p) (Roy &
    Vetterli 2007): 1 if all phases are multiples of one sub-kernel, as after `init.icnr_`, and the
    number of phases if these are orthogonal and equally strong. A value well below the number of
    phases says that fewer parameters would do: a smaller transposed convolution after
    interpolation, or a factorised kernel.

    Raises:
        ValueError: the model has no transposed convolution, or a lazy one.
    """
    rows = []
    for name, layer in layers(model):
        matrix = split_layer(layer).double().flatten(2).flatten(0, 1)
        values = torch.linalg.svdvals(matrix)
        if not values.any():
            rows.append((name, matrix.shape[0], 0.0, 0.0))
            continue
        p = values / values.sum()
        rank = float(torch.special.entr(p).sum().exp())
        rows.append((name, matrix.shape[0], rank, float(values[0] ** 2 / values.square().sum())))
    return LowRankReport(rows)
