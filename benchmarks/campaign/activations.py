"""Stage 8: what an activation in the store of the kernel saves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from activation import LAYER_NAMES, measure

from deconv_ext.activation import FUNCTIONS
from deconv_ext.testing import Case

from .context import Context
from .journal import Job, Row


def activations(context: Context, _: str) -> None:
    """Rows of benchmarks/activation.py: microseconds fused, and by separate operators."""
    journal = context.journal("8-activations")
    timer = context.timer(20, 0.05)
    layers = [case for case in context.layers() if context.dry or case.name in LAYER_NAMES]

    def rows(case: Case, name: str, op: str, dtype: str) -> Iterator[Row]:
        yield measure(case, name, op, timer, dtype) | {"dtype": dtype}

    def jobs() -> Iterator[Job]:
        for dtype, op, case, name in itertools.product(
            ("bfloat16", "float32"), ("forward", "step"), layers, FUNCTIONS
        ):
            yield f"{case} {name} {op} {dtype}", lambda c=(case, name, op, dtype): rows(*c)

    journal.run(context.some(jobs()))
