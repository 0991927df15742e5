"""What an activation in the store saves: python benchmarks/activation.py --help

Forward without gradients, and a training step, of a few layers with an activation: fused, as our
operator and torch's activation, and as torch does both. In turns, in quiet moments as
`python -m deconv_ext bench` (`GatedTimer`). The table has microseconds of the fused call and how
many times as fast as our operator followed by torch's activation it is.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from deconv_ext.activation import FUNCTIONS
from deconv_ext.bench_machine import environment
from deconv_ext.bench_table import dump, where
from deconv_ext.bench_timing import EventTimer, GatedTimer, Make, Timer
from deconv_ext.functional import conv_transpose2d
from deconv_ext.testing import LAYERS, Case

#: Bound by memory, by multiply-adds, and few or single channels.
LAYER_NAMES = ("unet_128_64", "linknet_64_64", "cyclegan_256_128", "dbnet_64_1", "dla_dw_64")
SLOPE = 0.01


def contenders(case: Case, name: str, train: bool, device: torch.device, dtype: str) -> Make:
    """The three ways by name. Sums have about the variance 1, as those of initialised layers."""
    x, w, bias, dy = (v.to(device, getattr(torch, dtype)) for v in case.operands(0))
    terms = w[:, 0].numel() / case.groups / math.prod(case.geometry[0])
    leaves = [v.requires_grad_(train) for v in (x, w / terms**0.5, bias)]
    arguments = case.torch_arguments

    def fused():
        return conv_transpose2d(*leaves, **arguments, activation=name, negative_slope=SLOPE)

    def ours():
        return FUNCTIONS[name](conv_transpose2d(*leaves, **arguments), SLOPE)

    def torchs():
        return FUNCTIONS[name](F.conv_transpose2d(*leaves, **arguments), SLOPE)

    ways = {"fused_us": fused, "ours_us": ours, "torch_us": torchs}
    if train:
        ways = {key: lambda f=f: torch.autograd.grad(f(), leaves, dy) for key, f in ways.items()}
    return lambda _: ways


def measure(case: Case, name: str, op: str, timer: Timer, dtype: str) -> dict[str, Any]:
    with torch.set_grad_enabled(op == "step"):
        times = timer.compare(contenders(case, name, op == "step", timer.device, dtype))
    row = {"layer": case.name, "activation": name, "op": op}
    row |= {key: timing.us for key, timing in times.items()}
    return row | {"noisy": any(timing.noisy for timing in times.values())}


def markdown(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """A line for each layer and operation, a column for each activation."""
    names = list(dict.fromkeys(row["activation"] for row in rows))
    lines = [
        f"{where(facts)}, {facts['dtype']}, torch {facts['torch']}. Each cell: microseconds of the "
        "fused call, and how many times as fast it is as our operator followed by torch's "
        "activation; ~ marks cells with too few quiet samples.",
        "",
        f"| layer | | {' | '.join(names)} |",
        f"| --- | --- |{' ---: |' * len(names)}",
    ]
    for layer, op in dict.fromkeys((row["layer"], row["op"]) for row in rows):
        cells = [
            f"{'~' * row['noisy']}{row['fused_us']:.0f} ({row['ours_us'] / row['fused_us']:.2f}x)"
            for row in rows
            if (row["layer"], row["op"]) == (layer, op)
        ]
        lines.append(f"| {layer} | {op} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="a JSON file; an unfinished one is completed")
    parser.add_argument("--load", type=Path, help="show such a file instead of measuring")
    args = parser.parse_args()
    if args.load:
        print(markdown(**json.loads(args.load.read_text())))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    timer = (GatedTimer if args.device.type == "cpu" else EventTimer)(args.device, 7, 1.0)
    facts = environment(args.device, dtype=args.dtype)
    rows: list[dict[str, Any]] = []
    if args.output and args.output.exists():
        rows = json.loads(args.output.read_text())["rows"]
    done = {(row["layer"], row["op"], row["activation"]) for row in rows}
    for case in (case for case in LAYERS if case.name in LAYER_NAMES):
        for op in ("forward", "step"):
            for name in FUNCTIONS:
                if (case.name, op, name) in done:
                    continue
                rows.append(measure(case, name, op, timer, args.dtype))
                print(rows[-1], flush=True)
                if args.output:
                    dump(args.output, {"facts": facts, "rows": rows})
    print(markdown(facts, rows))


if __name__ == "__main__":
    main()
