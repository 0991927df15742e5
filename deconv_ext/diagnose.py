"""``python -m deconv_ext diagnose module:factory``: look for checkerboards in a model.

The factory is a function without arguments that returns a model, or (model, sample) where the
sample is an input for it; the module is looked for in the current folder too.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkerboard import Diagnosis, LayerDiagnosis, diagnose, low_rank_report


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis of a model; 0 if it could be loaded and run."""
    parser = argparse.ArgumentParser(prog="python -m deconv_ext diagnose", description=__doc__)
    parser.add_argument("factory", metavar="module:factory")
    parser.add_argument(
        "--sample", metavar="N,C,H,W", help="shape of a random input, where the factory gives none"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw it (matplotlib)")
    options = parser.parse_args(argv)
    try:
        model, sample = _load(options.factory)
        if options.sample:
            shape = [int(side) for side in options.sample.split(",")]
            sample = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        print(f"deconv_ext diagnose: {options.factory}: {error}", file=sys.stderr)
        return 1
    report = diagnose(model, sample)
    print(report, low_rank_report(model), sep="\n\n")
    if options.figure:
        draw(report, options.figure)
        print(f"wrote {options.figure}")
    return 0


def _load(name: str) -> tuple[nn.Module, Any]:
    module, separator, factory = name.partition(":")
    if not separator:
        raise ValueError("expected module:factory")
    sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), factory)()
    finally:
        sys.path.remove("")
    model, sample = made if isinstance(made, tuple) else (made, None)
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, but the factory made a {type(model)}")
    return model, sample


def draw(report: Diagnosis, path: Path) -> None:
    """A row for each layer: impulse response, gains, and with a sample the output's spectrum."""
    from matplotlib.figure import Figure

    columns = 2 + any(layer.output is not None for layer in report.layers)
    figure = Figure(figsize=(4.2 * columns, 3.4 * len(report.layers)), layout="constrained")
    grid = figure.subplots(len(report.layers), columns, squeeze=False)
    for axes, layer in zip(grid, report.layers, strict=True):
        title = layer.name or "(the model)"
        picture = axes[0].imshow(layer.impulse.cpu(), cmap="viridis", vmin=0)
        axes[0].set_title(f"{title}: impulse response,\nrms over channels", fontsize=10)
        axes[0].set(xlabel="kernel column", ylabel="kernel row")
        axes[0].set_xticks(range(layer.impulse.shape[1]))
        axes[0].set_yticks(range(layer.impulse.shape[0]))
        figure.colorbar(picture, ax=axes[0])
        picture = axes[1].imshow(layer.gains.cpu(), cmap="coolwarm", vmin=0, vmax=2)
        axes[1].set_title(f"gain by phase (mean = 1),\nDC share {layer.dc_share:.1%}", fontsize=10)
        axes[1].set(xlabel="phase, columns", ylabel="phase, rows")
        axes[1].set_xticks(range(layer.gains.shape[1]))
        axes[1].set_yticks(range(layer.gains.shape[0]))
        figure.colorbar(picture, ax=axes[1])
        if columns == 3:
            _draw_spectrum(axes[2], layer)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def _draw_spectrum(axes: Any, layer: LayerDiagnosis) -> None:
    """Power over the horizontal frequency, summed over channels and vertical frequencies."""
    if layer.output is None:
        axes.set_axis_off()
        return
    step = layer.stride[1]
    image = layer.output.double()
    image = image[..., : image.shape[-1] // step * step]
    image = image - image.mean(dim=(-2, -1), keepdim=True)
    power = torch.fft.rfft(image, norm="forward").abs().square().sum(dim=(0, 1)).cpu()
    axes.semilogy(torch.arange(len(power)) / image.shape[-1], power.clamp(min=1e-12))
    for multiple in range(1, step // 2 + 1):
        axes.axvline(multiple / step, color="tab:red", linestyle=":", linewidth=1)
    axes.set_title(
        f"spectrum of the output (red: multiples\nof 1/{step}), share {layer.output_share:.1%}",
        fontsize=10,
    )
    axes.set(xlabel="frequency (cycles per pixel)", ylabel="power")
