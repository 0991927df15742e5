"""What the examples that train a network share: arguments, training in turns, report, pictures.

Each of them can build one and the same network of our transposed convolution and of torch's, which
has the same arguments, and from one seed the same initial weights. The networks then train in
turns, step by step on the same batches: whatever else the machine does falls on both alike, so that
their times can be compared, and their losses differ by rounding alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor, nn
from tqdm import tqdm

import deconv_ext
from deconv_ext import report

OPERATORS: dict[str, type[nn.ConvTranspose2d]] = {
    "deconv_ext": deconv_ext.ConvTranspose2d,
    "torch": nn.ConvTranspose2d,
}
#: So many first losses are compared, with this for a tolerance (see `disagreement`). Later ones
#: may part: training is chaotic, and multiplies the difference that two orders of summation make.
COMPARED_STEPS, TOLERANCE = 10, 1e-3


# --- arguments -----------------------------------------------------------------------------------


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all examples have; a script adds its own and calls `parse`."""
    result = argparse.ArgumentParser(description=description.split("\n")[0])
    result.add_argument("--operator", choices=[*OPERATORS, "both"], default="both")
    result.add_argument("--quick", action="store_true", help="a smaller training, seconds long")
    result.add_argument("--steps", type=int, help="training steps, in place of the usual number")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device
    )
    result.add_argument("--output", type=Path, default=Path("demo_output"), help="for pictures")
    return result


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, steps: int, quick_steps: int
) -> argparse.Namespace:
    """The options, with `steps` filled in and `operators` the list of those to train with."""
    options = parser.parse_args(argv)
    if options.steps is None:
        options.steps = quick_steps if options.quick else steps
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, but got {options.steps}")
    options.operators = list(OPERATORS) if options.operator == "both" else [options.operator]
    return options


# --- training ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A network in training. `step` learns from one batch and returns the loss before that."""

    name: str
    operator: str
    model: nn.Module
    step: Callable[[Any], Tensor]
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each step

    @property
    def milliseconds(self) -> float:
        """The median time of a step: the first one may compile, others may be disturbed."""
        return 1e3 * statistics.median(self.seconds)


def supervised(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    learning_rate: float,
    steps: int,
) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """A step for batches (input, target): Adam, the rate rising and falling once in `steps`."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps)

    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        input, target = batch
        loss = criterion(model(input), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return loss.detach()

    return step


def train(
    runs: Sequence[Run],
    batches: Iterator[Any],
    steps: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """All runs in turns, with the same batches; `after(step)` is called when all made `step`."""
    with tqdm(range(1, steps + 1), desc="training", unit="step", mininterval=0.5) as progress:
        for step in progress:
            batch = next(batches)
            for run in runs:
                start = time.perf_counter()
                run.losses.append(float(run.step(batch)))  # the number waits for the device
                run.seconds.append(time.perf_counter() - start)
            if step % 10 == 0:
                progress.set_postfix(loss=f"{runs[0].losses[-1]:.3g}")
            after(step)


def pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """(ours, torch's) of every network that trained with both operators."""
    ours, torchs = ([run for run in runs if run.operator == name] for name in OPERATORS)
    return [(a, b) for a in ours for b in torchs if a.name == b.name]


def disagreement(run: Run, other: Run, steps: int = COMPARED_STEPS) -> float:
    """The largest difference of the first losses, relative to the largest of these losses."""
    first = list(zip(run.losses, other.losses, strict=True))[:steps]
    return max(abs(a - b) for a, b in first) / max(abs(loss) for both in first for loss in both)


# --- report --------------------------------------------------------------------------------------


def table(runs: Sequence[Run], quality: dict[str, Sequence[str]], *notes: str) -> str:
    """One line a run, with its time; `quality` holds further columns, a cell for each run."""
    rows = [["network", "operator", "steps", "ms/step", "last loss", *quality]]
    for run, *cells in zip(runs, *quality.values(), strict=True):
        loss = statistics.fmean(run.losses[-10:])
        count, duration = str(len(run.losses)), f"{run.milliseconds:.1f}"
        rows.append([run.name, run.operator, count, duration, f"{loss:.4g}", *cells])
    return report.table(rows, *notes)


def agree(runs: Sequence[Run], steps: int = COMPARED_STEPS) -> bool:
    """Say how far the losses of each network trained with both operators differ; False if far.

    `steps` are so few that the weights have been updated about COMPARED_STEPS times.
    """
    apart = [disagreement(*pair, steps) for pair in pairs(runs)]
    for (ours, torchs), difference in zip(pairs(runs), apart, strict=True):
        print(
            f"{ours.name}: the losses of the first {steps} steps differ by "
            f"{difference:.1e} of the largest, {_verdict(difference)}; "
            f"a step with torch takes {torchs.milliseconds / ours.milliseconds:.2f} times as long"
        )
    return all(difference < TOLERANCE for difference in apart)


def _verdict(difference: float) -> str:
    return "as rounding does" if difference < TOLERANCE else f"MORE THAN {TOLERANCE}"


# --- pictures ------------------------------------------------------------------------------------


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    print(f"wrote {path}")


def tile(images: Tensor, columns: int) -> Tensor:
    """[N, C, H, W] to one image [C, rows * (H + 1) + 1, columns * (W + 1) + 1], rules between."""
    framed = nn.functional.pad(images, (0, 1, 0, 1), value=1.0)
    rows = framed.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)
    return nn.functional.pad(rows.flatten(3, 4).flatten(1, 2), (1, 0, 1, 0), value=1.0)


def picture_grid(
    rows: Sequence[Sequence[tuple[str, Tensor]]],
    path: Path,
    width: float = 3.0,
    legend: dict[str, Any] | None = None,
) -> None:
    """Rows of (title, image), an image being [H, W], [1, H, W] or [3, H, W] in 0..1.

    `width` is that of an image in inches, `legend` maps labels to colours.
    """
    shape = rows[0][0][1].shape
    height = width * shape[-2] / shape[-1] + 0.3
    figure = Figure(
        figsize=(width * len(rows[0]), height * len(rows) + 0.6 * bool(legend)),
        layout="constrained",
    )
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axes_row, pictures in zip(grid, rows, strict=True):
        for axes, (title, picture) in zip(axes_row, pictures, strict=True):
            image = picture.detach().cpu().clamp(0, 1)
            image = image.movedim(0, -1).squeeze(-1) if image.ndim == 3 else image
            axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(title, fontsize=10)
            axes.set_axis_off()
    if legend:
        patches = [Patch(facecolor=colour, label=label) for label, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=6)
    save(figure, path)


def draw_curves(runs: Sequence[Run], path: Path, ylabel: str) -> None:
    """The losses of all runs; where there are both operators, also how far they are apart."""
    compared = pairs(runs)
    panels = 1 + bool(compared)
    figure = Figure(figsize=(5.5 * panels, 3.5), layout="constrained")
    losses, *rest = figure.subplots(1, panels, squeeze=False)[0]
    for run in runs:
        style = "--" if run.operator == "torch" else "-"
        losses.plot(run.losses, style, label=f"{run.name}, {run.operator}", lw=1)
    losses.set(xlabel="training step", ylabel=ylabel)
    losses.legend(fontsize=8)
    for axes in rest:
        for ours, torchs in compared:
            difference = [abs(a - b) for a, b in zip(ours.losses, torchs.losses, strict=True)]
            axes.plot(difference, lw=1, label=ours.name)
        axes.set(xlabel="training step", ylabel="|loss of ours - loss of torch's|", yscale="log")
        axes.legend(fontsize=8)
    save(figure, path)
