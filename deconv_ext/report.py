"""What reports on models share: a sample run, differences, a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def table(rows: Sequence[Sequence[str]], *notes: str) -> str:
    """The rows in columns, the first one underlined, and lines below."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *notes])


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def total(max_abs: float | None, max_rel: float | None) -> str:
    """The end of the last line: how far the model's outputs differ, if they were compared."""
    if max_abs is None:
        return ""
    return (
        f"; largest difference of the model's output: {number(max_abs)}"
        f" ({number(max_rel)} of its largest value)"
    )


def run(model: nn.Module, sample: Any) -> list[Tensor]:
    """The tensors of the model's output, computed without leaving a trace in model or sample."""
    sample = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, sample)
    args, kwargs = ((), sample) if isinstance(sample, dict) else (sample, {})
    args = args if isinstance(args, tuple) else (args,)
    training = [(module, module.training) for module in model.modules()]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(cuda):
            torch.manual_seed(0)
            output = model(*args, **kwargs)
    finally:
        for module, mode in training:
            module.training = mode
    return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def difference(got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """The largest difference, absolute and divided by the largest absolute value wanted."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf, math.inf
    largest = scale = 0.0
    for a, b in zip(got, want, strict=True):
        if a.numel() == 0:
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        same = (a == b) | ((a != a) & (b != b))
        error = (a - b).abs().masked_fill(same, 0).nan_to_num(nan=math.inf)
        largest = max(largest, error.max().item())
        scale = max(scale, b.abs().nan_to_num(nan=0, posinf=0).max().item())
    return largest, largest / scale if scale else math.inf if largest else 0.0
