"""``python -m deconv_ext bench``: every layer of layers.csv, ours against torch's.

For each layer, operation and memory layout, ours and torch's operator run in turns in one process,
on the same operands. All that a caller pays for is in the time: packing, allocation of the result.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from . import __version__, bench_table, functional
from .bench_table import Row
from .bench_timing import Timer
from .build import build_info, extension
from .testing import Case, load_layers

OPERATIONS = ("forward", "grad_input", "grad_weight", "step")  # step: forward and backward
LAYOUTS = ("contiguous", "channels_last")
OVERHEAD = ("forward", "forward_grad", "step")
#: Largest difference from torch's result, relative to its largest value, that is worth timing.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def contenders(
    case: Case, op: str, dtype: torch.dtype, layout: str, device: torch.device, algo: str
) -> dict[str, Callable[[], Any]]:
    """The functions "ours" and "torch", without arguments, that compute the same."""
    x, w, bias, dy = (operand.to(device) for operand in case.operands(0, dtype, layout))
    kernels, geometry = extension(), case.geometry
    # Operands that need no gradient make both sides skip autograd, as under no_grad.
    leaves = tuple(t.requires_grad_(op in ("forward_grad", "step")) for t in (x, w, bias))

    def backward(mask: list[bool]) -> list[Any]:
        arguments = case.torch_arguments
        names = ("stride", "padding", "dilation")
        return torch.ops.aten.convolution_backward(
            *(dy, x, w, [case.c_out], *(arguments[name] for name in names)),
            *(True, arguments["output_padding"], arguments["groups"], mask),
        )

    def forward_of(function: Callable[..., Any]) -> Callable[[], Any]:
        arguments = case.torch_arguments
        return lambda: function(*leaves, **arguments)

    def step_of(function: Callable[..., Any]) -> Callable[[], Any]:
        forward = forward_of(function)
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    if op in ("forward", "forward_grad"):
        ours = forward_of(functional.conv_transpose2d)
        if algo != "auto":
            ours = lambda: kernels.forward(x, w, bias, *geometry, algo)  # noqa: E731
        return {"ours": ours, "torch": forward_of(torch.nn.functional.conv_transpose2d)}
    if op == "grad_input":
        return {
            "ours": lambda: kernels.grad_input(dy, w, case.input_size, *geometry, algo),
            "torch": lambda: backward([True, False, False])[0],
        }
    if op == "grad_weight":
        return {
            "ours": lambda: kernels.grad_weight(x, dy, case.kernel, *geometry, algo),
            "torch": lambda: backward([False, True, False])[1],
        }
    return {
        "ours": step_of(functional.conv_transpose2d),
        "torch": step_of(torch.nn.functional.conv_transpose2d),
    }


def check(functions: dict[str, Callable[[], Any]], dtype: torch.dtype, what: str) -> None:
    """Raise ValueError if the two do not compute the same: no point in timing that."""
    ours, theirs = (functions[name]() for name in ("ours", "torch"))
    if isinstance(ours, torch.Tensor):
        ours, theirs = (ours,), (theirs,)
    for a, b in zip(ours, theirs, strict=True):
        error = (a - b).abs().max() / b.abs().max()
        if not error <= TOLERANCE[dtype]:
            raise ValueError(f"{what}: result differs from torch's by {error:.1e}")


def measure(
    case: Case, op: str, dtype: torch.dtype, layouts: Sequence[str], timer: Timer, algo: str
) -> Iterator[Row]:
    """A row for each layout; all of them take part in the same turns."""
    functions: dict[str, Callable[[], Any]] = {}
    for layout in layouts:
        pair = contenders(case, op, dtype, layout, timer.device, algo)
        check(pair, dtype, f"{case} {op} {layout}")
        functions |= {f"{who} {layout}": function for who, function in pair.items()}
    timings = timer.compare(functions)
    work = 3 if op == "step" else 1  # the three products have the same size
    for layout in layouts:
        ours, theirs = timings[f"ours {layout}"], timings[f"torch {layout}"]
        yield Row(
            layer=case.name,
            kind=case.kind,
            op=op,
            layout=layout,
            ours_us=ours.us,
            torch_us=theirs.us,
            torch_best_us=min(timings[f"torch {each}"].us for each in layouts),
            flops=2 * work * case.macs,
            bytes=work * case.min_bytes(dtype),
            quiet=min(ours.quiet, theirs.quiet),
            noisy=ours.noisy or theirs.noisy,
        )


def device_name(device: torch.device) -> str:
    """The model of the processor or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def environment(timer: Timer, options: argparse.Namespace) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    info = build_info()
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "commit": git.stdout.strip() or None,
        "device": device_name(timer.device),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "algo": options.algo,
        "deconv_ext": __version__,
        "isa": info["cpu_isa"],
        "compiler": info["cxx"],
        "source_hash": info["source_hash"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "samples": timer.samples,
        "machine": timer.machine(),
    }


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
    what.add_argument("--dtype", default="float32", choices=[str(d)[6:] for d in TOLERANCE])
    what.add_argument("--algo", default="auto", help="force this implementation of ours")
    what.add_argument("--device", default="cpu", type=torch.device)
    what.add_argument("--threads", type=int, help="of torch and of ours")
    what.add_argument(
        "--overhead", action="store_true", help="the cost of a call: the layer `tiny`, contiguous"
    )
    what.add_argument("--samples", type=int, default=9, help="quiet samples wanted")
    what.add_argument("--seconds", type=float, default=2.0, help="time limit of a measurement")
    out = parser.add_argument_group("what to do with it")
    out.add_argument("--load", type=Path, metavar="JSON", help="show this file, measure nothing")
    out.add_argument("--output", type=Path, metavar="JSON", help="write the result there")
    out.add_argument(
        "--save", action="store_true", help="write it to benchmarks/results/<device>/<dtype>.json"
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
    return options


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Measure what the options ask for, printing the rows as they come."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        sys.exit("the benchmark shows its progress with tqdm: pip install tqdm")
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    batch = "gpu" if options.device.type == "cuda" else "cpu"
    cases = [case for case in load_layers(batch) if re.search(options.layers, case.name)]
    timer = Timer(options.device, options.samples, options.seconds)
    facts = environment(timer, options)
    print(bench_table.headline(facts))
    print(bench_table.HEADER, flush=True)
    rows = []
    jobs = list(itertools.product(cases, options.ops))
    with tqdm(jobs, unit="row", leave=False, disable=None) as progress:
        for case, op in progress:
            progress.set_postfix_str(f"{case} {op}")
            for row in measure(case, op, dtype, options.layouts, timer, options.algo):
                rows.append(row)
                progress.write(bench_table.line(row, facts))
    return facts, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured; 1 if a check fails."""
    options = parse(argv)
    if options.update_readme or options.check_readme:
        stale = bench_table.refresh(
            options.update_readme or options.check_readme, write=bool(options.update_readme)
        )
        return 1 if stale and options.check_readme else 0
    if options.load:
        facts, rows = bench_table.load(options.load)
        if not options.markdown:
            print(bench_table.headline(facts), bench_table.HEADER, sep="\n")
            print(*(bench_table.line(row, facts) for row in rows), sep="\n")
    else:
        facts, rows = run(options)
    if options.markdown:
        print(bench_table.markdown(facts, rows))
    else:
        print(bench_table.summary(rows))
    path = options.output
    if options.save:
        name = f"{facts['device']}-{facts['threads']}-threads"
        folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        path = Path("benchmarks", "results", folder, f"{facts['dtype']}.json")
    if path:
        bench_table.save(path, facts, rows)
        print(f"wrote {path}")
    if options.plot:
        bench_table.plot(options.plot, facts, rows)
        print(f"wrote {options.plot}")
    slow = [row for row in rows if options.check and row.ratio < options.check]
    for row in slow:
        print(f"TOO SLOW: {row.layer} {row.op} {row.layout}: {row.ratio:.2f}x", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
