"""Results of `upsampling.py`: rows, and how they are compared, printed and drawn.

A row holds the quality and the checkerboard of a trained network, and the costs of its upsampling
stages. Each rival is compared with our transposed convolution. Two trainings differ by chance; by
how much is taken from our operator and torch's, whose networks differ in rounding alone.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from deconv_ext import report

OURS, TORCHS = "transposed, deconv_ext", "transposed, torch"
TIE = 0.05  # relative difference of costs that does not count


@dataclasses.dataclass
class Row:
    """A rival in a task. `quality` and `ripple` hold a value for each seed."""

    task: str
    measure: str  # of quality; more is better
    rival: str
    steps: int  # of training
    quality: list[float]
    ripple: list[float]  # root mean square over phases, in 1/255
    parameters: int  # of the stages alone, as all that follows
    multiply_adds: int
    forward_us: float
    backward_us: float
    peak_bytes: int | None  # forward and backward

    def spread(self, name: str) -> str:
        """The mean of `quality` or `ripple` ± half its range over the seeds."""
        values = getattr(self, name)
        half = (max(values) - min(values)) / 2
        return f"{statistics.fmean(values):.4g}" + (f" ± {half:.2g}" if len(values) > 1 else "")


@dataclasses.dataclass(frozen=True)
class Measure:
    """A quantity that rows are compared by."""

    name: str
    value: Callable[[Row], list[float] | float | None]  # a list has a value for each seed
    more_is_better: bool = False

    def label(self, row: Row) -> str:
        """The name, with the unit; of the quality, what the task of the row measures."""
        return row.measure if self.name == "quality" else self.name

    def beats(self, row: Row, other: Row, chance: float) -> bool:
        """With every seed, by more than `chance`; of what was measured once, by more than TIE."""
        a, b = self.value(row), self.value(other)
        if a is None or b is None:
            return False
        if not isinstance(a, list):
            return a < b * (1 - TIE)
        sign = 1 if self.more_is_better else -1
        return all(sign * (x - y) > chance for x, y in zip(a, b, strict=True))

    def mean(self, row: Row) -> float | None:
        """Over the seeds; None if it was not measured."""
        value = self.value(row)
        return statistics.fmean(value) if isinstance(value, list) else value

    def chance(self, row: Row, same: Row) -> float:
        """How far two trainings end apart that differ in rounding alone."""
        a, b = self.value(row), self.value(same)
        return max(abs(x - y) for x, y in zip(a, b, strict=True)) if isinstance(a, list) else 0.0


MEASURES = (
    Measure("quality", lambda row: row.quality, more_is_better=True),
    Measure("ripple on even inputs (1/255)", lambda row: row.ripple),
    Measure("parameters (thousands)", lambda row: 1e-3 * row.parameters),
    Measure("multiply-adds (millions)", lambda row: 1e-6 * row.multiply_adds),
    Measure("forward (ms)", lambda row: 1e-3 * row.forward_us),
    Measure("backward (ms)", lambda row: 1e-3 * row.backward_us),
    Measure("peak memory (MiB)", lambda row: row.peak_bytes and row.peak_bytes / 2**20),
)


def table(rows: Sequence[Row]) -> str:
    """A line for each row: quality and checkerboard of the network, costs of the stages."""
    header = ("task", "rival", "quality", "ripple", "parameters", "M multiply-adds")
    lines: list[Sequence[str]] = [(*header, "forward ms", "backward ms", "peak MiB")]
    for row in rows:
        lines.append(
            (
                f"{row.task}, {row.measure}",
                row.rival,
                row.spread("quality"),
                row.spread("ripple"),
                str(row.parameters),
                f"{1e-6 * row.multiply_adds:.1f}",
                f"{1e-3 * row.forward_us:.2f}",
                f"{1e-3 * row.backward_us:.2f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
            )
        )
    return report.table(
        lines,
        "quality and ripple (1/255): mean ± half the range over seeds; the rest: the stages alone",
    )


def verdicts(rows: Sequence[Row]) -> list[str]:
    """Who wins against our transposed convolution, in each task and measure.

    In quality and ripple a difference counts that every seed shows, and that is larger than what
    lies between ours and torch's operator, which make the same network; elsewhere 5 % count.
    """
    lines = []
    for task in dict.fromkeys(row.task for row in rows):
        by_rival = {row.rival: row for row in rows if row.task == task}
        ours, torchs = by_rival.pop(OURS), by_rival[TORCHS]
        for measure in MEASURES:
            if measure.value(ours) is None:
                continue
            chance = measure.chance(ours, torchs)
            better, worse, level = [], [], []
            for rival, row in by_rival.items():
                if measure.beats(row, ours, chance):
                    better.append(rival)
                elif measure.beats(ours, row, chance):
                    worse.append(rival)
                else:
                    level.append(rival)
            verdict = "; ".join(
                f"{how} " + ", ".join(f"{r} ({measure.mean(by_rival[r]):.4g})" for r in group)
                for how, group in (
                    ("BEATEN by", better),
                    ("level with", level),
                    ("ahead of", worse),
                )
                if group
            )
            lines.append(
                f"{task}, {measure.label(ours)}: {OURS} ({measure.mean(ours):.4g}) is {verdict}"
            )
    return lines


def draw(rows: Sequence[Row], path: Path) -> None:
    """A row of panels for each task, a panel for each measure, a bar for each rival.

    Dots are single seeds.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    figure = Figure(figsize=(17, 3.2 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(MEASURES), squeeze=False)
    rivals = dict.fromkeys(row.rival for row in rows)
    colours = {rival: f"C{i}" for i, rival in enumerate(rivals)}
    for task, axes_row in zip(tasks, grid, strict=True):
        found = [row for row in rows if row.task == task]
        for measure, axes in zip(MEASURES, axes_row, strict=True):
            values = [measure.mean(row) or 0.0 for row in found]
            axes.barh(range(len(found)), values, color=[colours[row.rival] for row in found])
            axes.set_xlabel(measure.label(found[0]), fontsize=9)
            axes.set_yticks(range(len(found)), [row.rival for row in found], fontsize=9)
            axes.invert_yaxis()
            axes.tick_params(axis="x", labelsize=8)
            if axes is not axes_row[0]:
                axes.set_yticklabels([])
            if measure.name == "quality":
                each = [value for row in found for value in row.quality]
                room = 0.3 * (max(each) - min(each)) or 0.1 * max(each)
                axes.set_xlim(min(each) - room, max(each) + room)  # bars from near the lowest
                for i, row in enumerate(found):
                    axes.plot(row.quality, [i] * len(row.quality), "k.", markersize=4)
        axes_row[0].set_title(task, loc="left", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=75)
    print(f"wrote {path}")
