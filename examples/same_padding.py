"""The pixel between TensorFlow's SAME and torch's padding=1, output_padding=1.

A kernel of 3 with stride 2 makes 2n + 1 outputs of n inputs. Both libraries keep 2n of them:
TensorFlow drops the last, torch the first. `<output>/same_padding.png` draws both, from results
of the operator.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import deconv_ext

SIZE, KERNEL, STRIDE = 3, 3, 2
#: name, arguments, colour
WAYS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("all 2n + 1 outputs\nno padding", {}, "tab:gray"),
    ('TensorFlow: SAME\npadding="same"', {"padding": "same"}, "tab:blue"),
    (
        "torch: padding=1,\noutput_padding=1",
        {"padding": 1, "output_padding": 1},
        "tab:orange",
    ),
)


def place(part: Tensor, whole: Tensor) -> int:
    """Where `part` begins in `whole`, both [n]; -1 if it is not in there."""
    windows = whole.unfold(0, len(part), 1)
    return next((i for i, window in enumerate(windows) if torch.equal(window, part)), -1)


def outputs() -> list[Tensor]:
    """The outputs [OL] of each of the `WAYS`, for one input and one kernel."""
    x, w = torch.arange(1.0, SIZE + 1), torch.tensor([1.0, 10.0, 100.0])
    return [
        deconv_ext.conv_transpose1d(x[None, None], w[None, None], stride=STRIDE, **arguments)[0, 0]
        for _, arguments, _ in WAYS
    ]


def draw(places: Sequence[int], lengths: Sequence[int], path: Path) -> None:
    """Left what each input pixel reaches and what is kept; right one bright pixel, enlarged."""
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    left, *right = figure.subplots(1, 3, width_ratios=[2.2, 1, 1])
    _draw_rows(left, places, lengths)
    bright = torch.zeros(1, 1, 5, 5)
    bright[0, 0, 2, 2] = 1
    taps = torch.tensor([0.5, 1, 0.5])
    for axes, (name, arguments, color) in zip(right, WAYS[1:], strict=True):
        y = deconv_ext.functional.conv_transpose2d(
            bright, torch.outer(taps, taps)[None, None], stride=STRIDE, **arguments
        )[0, 0]
        axes.imshow(y, cmap="Greys", vmin=0, vmax=1.3, extent=(0, 10, 10, 0))
        axes.set(xticks=range(11), yticks=range(11), xticklabels=[], yticklabels=[])
        axes.grid(linewidth=0.4)
        axes.axhline(5, color="black", linestyle=":")
        axes.axvline(5, color="black", linestyle=":")
        axes.set_title(name, fontsize=10, color=color)
        axes.set_xlabel("one bright pixel of 5 x 5, in 10 x 10\n(dotted: the middle)", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _draw_rows(axes: Any, places: Sequence[int], lengths: Sequence[int]) -> None:
    """Inputs on top, each with lines to the outputs that it adds to; a row for each way below."""
    reached = deconv_ext.conv_transpose1d(
        torch.eye(SIZE)[:, None], torch.ones(1, 1, KERNEL), stride=STRIDE
    )[:, 0]
    for i, o in reached.nonzero().tolist():
        axes.plot([STRIDE * i + 1, o], [3.28, 2.3], color="0.6", linewidth=1, zorder=0)
    for i in range(SIZE):
        axes.text(STRIDE * i + 1, 3.5, f"x{i}", ha="center", va="center", bbox={"fc": "white"})
    axes.text(-1.2, 3.5, "input", ha="right", va="center", fontsize=10)
    for row, ((name, _, color), start, length) in enumerate(
        zip(WAYS, places, lengths, strict=True)
    ):
        y = 2 - row
        axes.text(-1.2, y, name, ha="right", va="center", fontsize=10, color=color)
        for o in range(lengths[0]):
            kept = start <= o < start + length
            box = {"fc": color if kept else "white", "ec": color if kept else "0.7"}
            box |= {"alpha": 0.5 if kept else 1, "linestyle": "-" if kept else ":"}
            ink = "black" if kept else "0.7"
            axes.text(o, y, str(o), ha="center", va="center", bbox=box, color=ink)
    axes.set(xlim=(-4.2, lengths[0] - 0.4), ylim=(-0.6, 3.9))
    axes.set_title(f"kernel {KERNEL}, stride {STRIDE}: which outputs are kept", fontsize=10)
    axes.set_axis_off()


def main(argv: Sequence[str] | None = None) -> int:
    """Print and draw where each result lies; 0 if the two are one pixel apart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    options = parser.parse_args(argv)
    results = outputs()
    places = [place(y, results[0]) for y in results]
    for (name, _, _), y, start in zip(WAYS, results, places, strict=True):
        print(f"{name.splitlines()[0]:26} outputs {start} to {start + len(y) - 1}: {y.tolist()}")
    draw(places, [len(y) for y in results], options.output / "same_padding.png")
    print(f"wrote {options.output / 'same_padding.png'}")
    return 0 if places == [0, 0, 1] else 1


if __name__ == "__main__":
    sys.exit(main())
