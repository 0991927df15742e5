"""``python -m deconv_ext bench``: every layer of layers.csv, ours against torch's.

For each layer, operation and memory layout, ours and torch's operator run in turns in one process,
on the same operands. All that a caller pays for is in the time: packing, allocation of the result.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import bench_table
from .bench_contenders import LAYOUTS, OPERATIONS, PRECISIONS, measure
from .bench_machine import ceilings, environment
from .bench_table import Row
from .bench_timing import EventTimer, GatedTimer, Timer
from .build import extension
from .testing import load_layers

OVERHEAD = ("forward", "forward_grad", "step")
NO_MATPLOTLIB = "no picture: it is drawn with matplotlib, pip install matplotlib"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deconv_ext bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to measure")
    what.add_argument("--layers", default="", help="only layers whose name matches this regex")
    what.add_argument("--ops", nargs="+", choices=(*OPERATIONS, "forward_grad"), default=OPERATIONS)
    what.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    what.add_argument("--dtype", choices=PRECISIONS, help="default float32")
    what.add_argument(
        "--compare",
        choices=("torch", "tuned"),
        help="torch's operator as it is (default), or on CUDA with cuDNN's search of all it has",
    )
    what.add_argument("--algo", default="auto", help="force this implementation of ours")
    what.add_argument("--device", default="cpu", type=torch.device)
    what.add_argument("--threads", type=int, help="of torch and of ours")
    what.add_argument(
        "--overhead", action="store_true", help="the cost of a call: the layer `tiny`, contiguous"
    )
    what.add_argument("--samples", type=int, help="of each; default 9 quiet ones, 100 on CUDA")
    what.add_argument("--seconds", type=float, default=2.0, help="time limit of a measurement")
    out = parser.add_argument_group("what to do with it")
    out.add_argument(
        "--load", type=Path, metavar="JSON", help="show of this file what the above selects"
    )
    out.add_argument("--output", type=Path, metavar="JSON", help="write the result there")
    out.add_argument(
        "--save", action="store_true", help="to benchmarks/results/<device>/<dtype>.json and .png"
    )
    out.add_argument("--markdown", action="store_true", help="print the table of the README")
    out.add_argument("--plot", type=Path, metavar="PNG", help="draw speed-ups and the roofline")
    out.add_argument(
        "--check", type=float, metavar="RATIO", help="fail if a row has less than RATIO x torch"
    )
    out.add_argument("--update-readme", type=Path, metavar="MD", help="refresh its tables; no run")
    out.add_argument("--check-readme", type=Path, metavar="MD", help="fail if they are stale")
    options = parser.parse_args(argv)
    if options.overhead:
        options.layers, options.ops, options.layouts = "^tiny$", OVERHEAD, LAYOUTS[:1]
    if options.load:
        return options
    if options.device.type != "cuda" and options.compare == "tuned":
        parser.error(
            f"--compare tuned is about cuDNN and needs --device cuda, got {options.device}"
        )
    if options.device.type != "cuda" and options.dtype == "tf32":
        parser.error(f"--dtype tf32 needs --device cuda, got {options.device}")
    options.dtype = options.dtype or "float32"
    options.compare = options.compare or "torch"
    return options


def make_timer(device: torch.device, samples: int | None, seconds: float) -> Timer:
    """The timer that suits the device."""
    if device.type == "cuda":
        return EventTimer(device, samples or 100, seconds)
    return GatedTimer(device, samples or 9, seconds)


def with_progress(jobs: Sequence[Any]) -> Iterable[Any]:
    """The jobs with a bar on stderr; without tqdm the rows themselves are the progress."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return jobs
    shown: Iterable[Any] = tqdm(jobs, unit="job", leave=False, disable=None)
    return shown


def run(options: argparse.Namespace, path: Path | None) -> tuple[dict[str, Any], list[Row]]:
    """Measure what the options ask for; print each row, and write it, as it comes."""
    if options.threads:
        torch.set_num_threads(options.threads)
    extension()  # may have to be built first, and belongs to the environment
    batch = "gpu" if options.device.type == "cuda" else "cpu"
    cases = [case for case in load_layers(batch) if re.search(options.layers, case.name)]
    timer = make_timer(options.device, options.samples, options.seconds)
    facts = environment(
        options.device,
        dtype=options.dtype,
        algo=options.algo,
        compare=options.compare,
        samples=timer.samples,
        machine=ceilings(options.device, [options.dtype]),
    )
    print(bench_table.headline(facts))
    print(bench_table.HEADER, flush=True)
    rows: list[Row] = []

    def measured() -> Iterator[Row]:
        for case, op in with_progress(list(itertools.product(cases, options.ops))):
            yield from measure(
                *(case, op, options.dtype, options.layouts, timer, options.algo, options.compare)
            )

    for row in measured():
        rows.append(row)
        print(bench_table.line(row, facts), flush=True)
        if path:
            bench_table.save(path, facts, rows)
    return facts, rows


def result_path(options: argparse.Namespace) -> Path | None:
    """Where the result goes; with --save the picture goes beside it."""
    output: Path | None = options.output
    if not options.save:
        return output
    facts = environment(options.device)
    name = facts["device"]
    if options.device.type != "cuda":
        # Names of processors are vague on virtual machines.
        name += f"-{facts['isa']}-{options.threads or facts['threads']}-threads"
    folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = Path("benchmarks", "results", folder, f"{options.dtype}.json")
    options.plot = options.plot or path.with_suffix(".png")
    return path


def selection(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Of the file to load, the rows that the options ask for. ValueError if there are none."""
    facts, rows = bench_table.load(options.load)
    wanted = [
        row
        for row in rows
        if re.search(options.layers, row.layer)
        and row.op in options.ops
        and row.layout in options.layouts
        and options.dtype in (None, row.dtype)
        and options.compare in (None, row.compare)
    ]
    if not wanted:
        raise ValueError(f"{options.load} has no such row; it has {len(rows)} others")
    return facts | {"dtype": options.dtype or facts["dtype"]}, wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; 1 if a check fails."""
    options = parse(argv)
    if options.update_readme or options.check_readme:
        stale = bench_table.refresh(
            options.update_readme or options.check_readme, write=bool(options.update_readme)
        )
        return 1 if stale and options.check_readme else 0
    if options.load:
        facts, rows = selection(options)
        if options.output:
            bench_table.save(options.output, facts, rows)
        if not options.markdown:
            print(bench_table.headline(facts), bench_table.HEADER, sep="\n")
            print(*(bench_table.line(row, facts) for row in rows), sep="\n")
    else:
        path = result_path(options)
        facts, rows = run(options, path)
        if path:
            print(f"wrote {path}")
    if options.markdown:
        print(bench_table.markdown(facts, rows))
    else:
        print(bench_table.summary(rows))
    if options.plot:
        try:
            from .bench_plot import plot

            plot(options.plot, facts, rows)
            print(f"wrote {options.plot}")
        except ModuleNotFoundError:
            print(NO_MATPLOTLIB, file=sys.stderr)
    slow = [row for row in rows if options.check and row.ratio < options.check]
    for row in slow:
        print(f"TOO SLOW: {row.layer} {row.op} {row.layout}: {row.ratio:.2f}x", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
