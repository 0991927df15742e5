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
    dtype: str  # one of bench_contenders.PRECISIONS
    layout: str
    ours_us: float
    torch_us: float
    torch_best_us: float  # of the layouts measured
    flops: int
    bytes: int
    quiet: int  # samples that count
    noisy: bool  # too few did; the fastest samples stand in
    compare: str = "torch"  # or "tuned": cuDNN chose by timing all its candidates
    rewrite_us: float | None = None  # a matrix product and a shuffle of pixels, where that is it
    ours_error: float | None = None  # largest, against float64, relative to the largest value
    torch_error: float | None = None
    ours_host_us: float | None = None  # until the call returned to the host
    torch_host_us: float | None = None
    spread: float | None = None  # from the 10th to the 90th percentile, relative to the median
    mode: str = "wall"  # wall time, CUDA events or graph

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

    @property
    def gbs(self) -> float:
        """GB/s of the bytes that any implementation moves."""
        return 1e-3 * self.bytes / self.ours_us

    def of_roof(self, facts: dict[str, Any]) -> float:
        """The time that arithmetic or traffic takes at the machine's speed, as a part of ours."""
        machine = facts["machine"]
        return float(max(self.gflops / machine["gflops"][self.dtype], self.gbs / machine["gbs"]))


def dump(path: Path, content: dict[str, Any]) -> None:
    """Write JSON, a list as a line for each of its members; the file is complete at any moment."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return "[\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n]"
        return json.dumps(value, indent=1)

    members = (f"{json.dumps(key)}: {text(value)}" for key, value in _rounded(content).items())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("{" + ",\n".join(members) + "}\n")
    part.replace(path)


def save(path: Path, facts: dict[str, Any], rows: Iterable[Row]) -> None:
    dump(path, {"facts": facts, "rows": [dataclasses.asdict(row) for row in rows]})


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    content = json.loads(path.read_text())
    return content["facts"], [Row(**row) for row in content["rows"]]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def geomean(values: Iterable[float]) -> float:
    return math.exp(math.fsum(logs := [math.log(value) for value in values]) / len(logs))


# --- lines ---------------------------------------------------------------------------------------

HEADER = (
    f"{'layer':<20}{'class':<16}{'operation':<13}{'dtype':<9}{'layout':<14}{'us ours':>10}"
    f"{'us torch':>10}{'ratio':>8}{'best':>8}{'error':>9}{'torch':>9}{'GFLOP/s':>9}{'GB/s':>8}"
    f"{'of roof':>8}"
)


def machine_line(facts: dict[str, Any]) -> str:
    """The two ceilings; the second for each dtype measured."""
    machine = facts["machine"]
    rates = ", ".join(f"{rate:.0f} ({dtype})" for dtype, rate in machine["gflops"].items())
    return f"torch copies {machine['gbs']:.0f} GB/s and multiplies matrices at {rates} GFLOP/s"


def where(facts: dict[str, Any]) -> str:
    """The device and how it was used."""
    if "capability" in facts:
        return f"{facts['device']} ({facts['capability']})"
    return f"{facts['device']}, {facts['threads']} threads, {facts['isa']}"


def headline(facts: dict[str, Any]) -> str:
    return (
        f"{where(facts)}, {facts['dtype']}, torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date'][:10]}; {machine_line(facts)}"
    )


def line(row: Row, facts: dict[str, Any]) -> str:
    """`best` compares with torch's best layout; the roof is what arithmetic or copying allows."""
    errors = (
        f"{e:>9.1e}" if e is not None else f"{'':>9}" for e in (row.ours_error, row.torch_error)
    )
    return (
        f"{row.layer:<20}{row.kind:<16}{row.op:<13}{row.dtype:<9}{LAYOUT_NAMES[row.layout]:<14}"
        f"{row.ours_us:>10.1f}{row.torch_us:>10.1f}{row.ratio:>8.2f}{row.best_ratio:>8.2f}"
        f"{''.join(errors)}{row.gflops:>9.1f}{row.gbs:>8.1f}{row.of_roof(facts):>8.0%}"
        + (f"  rewrite {row.rewrite_us:.1f} us" if row.rewrite_us else "")
        + (f"  noisy: {row.quiet} quiet samples" if row.noisy else "")
    )


def _groups(rows: list[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows by the fields of these names, in the order of the rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in names), []).append(row)
    return groups


def summary(rows: list[Row]) -> str:
    """For each operation and layout: geometric mean and worst layer, of every class and of all."""
    lines = []
    for (compare, dtype, op, layout), group in _groups(
        rows, "compare", "dtype", "op", "layout"
    ).items():
        lines.append(
            f"\n{op}, {dtype}, {LAYOUT_NAMES[layout]}: times as fast as {compare} (its best layout)"
        )
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
                f"  {kind:<17}{mean:>6.2f} ({best:.2f})   worst {worst.ratio:.2f} {worst.layer}, "
                f"{sum(row.ratio < 0.95 for row in members)} of {len(members)} below 0.95"
            )
    return "\n".join(lines)


# --- README --------------------------------------------------------------------------------------


def markdown(facts: dict[str, Any], rows: list[Row]) -> str:
    """A table of layers by operation and layout: our microseconds and the ratio to torch's."""
    groups = _groups(rows, "op", "layout")
    names = [f"{op} {LAYOUT_NAMES[layout]}" for op, layout in groups]
    cells: dict[tuple[str, tuple[str, ...]], Row] = {
        (row.layer, (row.op, row.layout)): row for row in rows
    }
    table = [["layer", "class", *names], ["---", "---", *["---:"] * len(names)]]
    for layer, kind in dict.fromkeys((row.layer, row.kind) for row in rows):
        found = [cells.get((layer, group)) for group in groups]
        table.append([layer, kind, *(_cell(row) if row else "" for row in found)])
    means = [f"{geomean(row.ratio for row in group):.2f}x" for group in groups.values()]
    worst = [f"{min(row.ratio for row in group):.2f}x" for group in groups.values()]
    table += [["**geometric mean**", "", *means], ["**slowest**", "", *worst]]
    caption = (
        f"{where(facts)}, {facts['dtype']}, torch {facts['torch']}, commit {facts['commit']}, "
        f"{facts['date'][:10]}. Each cell: "
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
