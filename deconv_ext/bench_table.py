"""What the benchmark found, as JSON, as lines, as the table of the README and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LAYOUT_NAMES = {"contiguous": "NCHW", "channels_last": "channels_last"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer, operation and layout: medians in microseconds, and the least work there is."""

    layer: str
    kind: str
    op: str
    layout: str
    ours_us: float
    torch_us: float
    torch_best_us: float  # of the layouts measured
    flops: int
    bytes: int
    quiet: int  # samples that count
    noisy: bool  # too few did; the fastest samples stand in

    @property
    def ratio(self) -> float:
        """How many times as fast as torch in the same layout."""
        return self.torch_us / self.ours_us

    @property
    def best_ratio(self) -> float:
        """How many times as fast as torch in its best layout."""
        return self.torch_best_us / self.ours_us

    @property
    def gflops(self) -> float:
        return 1e-3 * self.flops / self.ours_us

    def roof_us(self, facts: dict[str, Any]) -> float:
        """Time that the arithmetic or the traffic takes at the best speed of the machine."""
        machine = facts["machine"]
        return 1e-3 * max(self.flops / machine["gflops"], self.bytes / machine["gbs"])


def save(path: Path, facts: dict[str, Any], rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(_rounded(dataclasses.asdict(row)))}" for row in rows)
    path.write_text(
        f'{{"facts": {json.dumps(_rounded(facts), indent=1)},\n"rows": [\n{lines}\n]}}\n'
    )


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    content = json.loads(path.read_text())
    return content["facts"], [Row(**row) for row in content["rows"]]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 2) if isinstance(value, float) else value


def geomean(values: Iterable[float]) -> float:
    return math.exp(math.fsum(logs := [math.log(value) for value in values]) / len(logs))


# --- lines ---------------------------------------------------------------------------------------

HEADER = (
    f"{'layer':<20}{'class':<16}{'operation':<13}{'layout':<15}{'us ours':>10}{'us torch':>10}"
    f"{'ratio':>7}{'best':>7}{'GFLOP/s':>9}{'of roof':>9}"
)


def headline(facts: dict[str, Any]) -> str:
    machine = facts["machine"]
    return (
        f"{facts['device']}, {facts['threads']} threads, {facts['isa']}, {facts['dtype']}, torch "
        f"{facts['torch']}, commit {facts['commit']}, {facts['date'][:10]}; the machine "
        f"reaches {machine['gflops']:.0f} GFLOP/s and copies {machine['gbs']:.0f} GB/s"
    )


def line(row: Row, facts: dict[str, Any]) -> str:
    """`best` compares with torch's best layout; the roof is what arithmetic or copying allows."""
    return (
        f"{row.layer:<20}{row.kind:<16}{row.op:<13}{LAYOUT_NAMES[row.layout]:<15}"
        f"{row.ours_us:>10.1f}{row.torch_us:>10.1f}{row.ratio:>7.2f}{row.best_ratio:>7.2f}"
        f"{row.gflops:>9.1f}{row.roof_us(facts) / row.ours_us:>9.0%}"
        + (f"  noisy: {row.quiet} quiet samples" if row.noisy else "")
    )


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by operation and layout, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.layout), []).append(row)
    return groups


def summary(rows: list[Row]) -> str:
    """For each operation and layout: geometric mean and worst layer, of every class and of all."""
    lines = []
    for (op, layout), group in _groups(rows).items():
        lines.append(f"\n{op}, {LAYOUT_NAMES[layout]}: times as fast as torch (its best layout)")
        kinds: dict[str, list[Row]] = {}
        for row in group:
            kinds.setdefault(row.kind, []).append(row)
        for kind, members in [*kinds.items(), ("all", group)]:
            worst = min(members, key=lambda row: row.ratio)
            mean, best = (
                geomean(values)
                for values in ([row.ratio for row in members], [row.best_ratio for row in members])
            )
            lines.append(
                f"  {kind:<17}{mean:>6.2f} ({best:.2f})   worst {worst.ratio:.2f} {worst.layer}"
            )
    return "\n".join(lines)


# --- README --------------------------------------------------------------------------------------


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """A table of layers by operation and layout: our microseconds and the ratio to torch's."""
    groups = _groups(rows)
    names = [f"{op} {LAYOUT_NAMES[layout]}" for op, layout in groups]
    cells = {(row.layer, row.op, row.layout): row for row in rows}
    table = [["layer", "class", *names], ["---", "---", *["---:"] * len(names)]]
    for layer, kind in dict.fromkeys((row.layer, row.kind) for row in rows):
        found = [cells.get((layer, *group)) for group in groups]
        table.append([layer, kind, *(_cell(row) if row else "" for row in found)])
    means = [f"{geomean(row.ratio for row in group):.2f}x" for group in groups.values()]
    worst = [f"{min(row.ratio for row in group):.2f}x" for group in groups.values()]
    table += [["**geometric mean**", "", *means], ["**slowest**", "", *worst]]
    caption = (
        f"{facts['device']}, {facts['threads']} threads, {facts['isa']}, {facts['dtype']}, torch "
        f"{facts['torch']}, commit {facts['commit']}, {facts['date'][:10]}. Each cell: "
        "microseconds of deconv_ext, and how many times as fast as torch on the same tensors; "
        f"~ marks the {sum(row.noisy for row in rows)} of {len(rows)} cells with too few quiet "
        "samples."
    )
    return "\n".join([caption, "", *(f"| {' | '.join(cells)} |" for cells in table)])


def _cell(row: Row) -> str:
    return f"{'~' if row.noisy else ''}{row.ours_us:.0f} ({row.ratio:.2f}x)"


_BLOCK = re.compile(r"(<!-- benchmark: (\S+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def refresh(readme: Path, write: bool) -> bool:
    """Whether a table in the file differs from what its JSON says; with `write`, mend it.

    A table stands between `<!-- benchmark: path/of.json -->`, relative to the file, and
    `<!-- /benchmark -->`. ValueError if there is none.
    """
    text = readme.read_text()
    if not _BLOCK.search(text):
        raise ValueError(f"{readme} has no <!-- benchmark: ... --> block")
    fresh = _BLOCK.sub(
        lambda block: f"{block[1]}{markdown(*load(readme.parent / block[2]))}\n{block[3]}", text
    )
    if fresh != text:
        print(f"{readme}: the benchmark tables {'were' if write else 'are'} not what the JSON says")
        if write:
            readme.write_text(fresh)
    return fresh != text


# --- picture -------------------------------------------------------------------------------------


def plot(path: Path, facts: dict[str, Any], rows: list[Row]) -> None:
    """Speed-up of every layer, and both contenders under the roofline, for the first operation."""
    from matplotlib.figure import Figure

    op = rows[0].op
    rows = [row for row in rows if row.op == op]
    layers = list(dict.fromkeys(row.layer for row in rows))
    figure = Figure(figsize=(15, 3 + 0.22 * len(layers)), layout="constrained")
    bars, roof = figure.subplots(1, 2)
    figure.suptitle(f"{op}: {facts['device']}, {facts['threads']} threads, {facts['dtype']}")

    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte of operands", ylabel="GFLOP/s")
    roof.set_title("line: fastest product or convolution, and copy, of torch on this machine")
    bars.set(xscale="log", xlabel="times as fast as torch in the same layout")
    bars.set(yticks=range(len(layers)), yticklabels=layers, ylim=(len(layers) - 0.5, -0.5))
    bars.xaxis.set_major_formatter("{x:g}")
    layouts = list(dict.fromkeys(row.layout for row in rows))
    for index, layout in enumerate(layouts):
        found = [row for row in rows if row.layout == layout]
        color, name, height = f"C{index}", LAYOUT_NAMES[layout], 0.8 / len(layouts)
        places = [layers.index(row.layer) + height * (index + 0.5) - 0.4 for row in found]
        lengths = [row.ratio - 1 for row in found]
        bars.barh(places, lengths, height, left=1, color=color, label=name)
        for who, marker in (("ours", "o"), ("torch", "x")):
            intensity = [row.flops / row.bytes for row in found]
            speed = [1e-3 * row.flops / getattr(row, f"{who}_us") for row in found]
            roof.plot(intensity, speed, marker, color=color, label=f"{who}, {name}")
    bars.axvline(1, color="black", linewidth=1)
    bars.legend()

    machine = facts["machine"]
    intensities = sorted(row.flops / row.bytes for row in rows)
    knee = machine["gflops"] / machine["gbs"]
    line_x = sorted({intensities[0], knee, max(intensities[-1], knee)})
    roof.plot(line_x, [min(machine["gflops"], x * machine["gbs"]) for x in line_x], "k-")
    roof.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
