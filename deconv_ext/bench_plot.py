"""The picture of a benchmark: speed-up of every layer, and all of them under the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .bench_table import LAYOUT_NAMES, Row, where


def plot(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """One operation, that of the first row, and its dtype; PNG. Needs matplotlib."""
    from matplotlib.figure import Figure

    first = rows[0]
    rows = [
        row
        for row in rows
        if (row.op, row.dtype, row.compare) == (first.op, first.dtype, first.compare)
    ]
    layers = list(dict.fromkeys(row.layer for row in rows))
    figure = Figure(figsize=(15, 4 + 0.22 * len(layers)), layout="constrained")
    bars, roof = figure.subplots(1, 2)
    figure.suptitle(f"{first.op}, {first.dtype}: {where(facts)}, torch {facts['torch']}")
    layouts = list(dict.fromkeys(row.layout for row in rows))
    for index, layout in enumerate(layouts):
        found = [row for row in rows if row.layout == layout]
        color, name, height = f"C{index}", LAYOUT_NAMES[layout], 0.8 / len(layouts)
        places = [layers.index(row.layer) + height * (index + 0.5) - 0.4 for row in found]
        bars.barh(places, [row.ratio - 1 for row in found], height, left=1, color=color, label=name)
        for who, marker in (("ours", "o"), ("torch", "x")):
            intensity = [row.flops / row.bytes for row in found]
            speed = [1e-3 * row.flops / getattr(row, f"{who}_us") for row in found]
            roof.plot(intensity, speed, marker, color=color, label=f"{who}, {name}", alpha=0.8)
    _finish_bars(bars, layers, [row.ratio for row in rows])
    _finish_roof(roof, facts["machine"], first.dtype, [row.flops / row.bytes for row in rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _finish_bars(axes: Any, layers: list[str], ratios: list[float]) -> None:
    """One line a layer, the first on top; ticks at 1, 2, 4, ... and their inverses."""
    axes.set(xscale="log", xlabel="times as fast as torch in the same layout (1: equal)")
    axes.set(yticks=range(len(layers)), yticklabels=layers, ylim=(len(layers) - 0.5, -0.5))
    low, high = min([*ratios, 0.8]) / 1.1, max([*ratios, 1.25]) * 1.1
    ticks = [2.0**power for power in range(-10, 11) if low <= 2.0**power <= high]
    axes.set(xlim=(low, high), xticks=ticks, xticklabels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.axvline(1, color="black", linewidth=1)
    axes.legend()


def _finish_roof(axes: Any, machine: dict[str, Any], dtype: str, intensities: list[float]) -> None:
    """The line min(matmul, intensity * copy) over the range of the points."""
    flops, bandwidth = machine["gflops"][dtype], machine["gbs"]
    knee = flops / bandwidth
    low, high = min([*intensities, knee]) / 2, max([*intensities, knee]) * 2
    label = f"roof: matmul {flops:.0f} GFLOP/s, copy_ {bandwidth:.0f} GB/s"
    axes.plot([low, knee, high], [low * bandwidth, flops, flops], "k-", label=label)
    axes.set(xscale="log", yscale="log", xlim=(low / 1.2, high * 1.2))
    axes.set(xlabel="FLOP per byte (x, w and y once each)", ylabel="GFLOP/s")
    axes.set_title("roof: what torch reaches, measured in the same run")
    axes.grid(alpha=0.3)
    axes.legend()
