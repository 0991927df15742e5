"""Stage 8: what an activation in the store of the kernel saves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from activation import LAYER_NAMES, measure

from deconv_ext.activation import FUNCTIONS

from .context import Context
from .journal import Job


def activations(context: Context, _: str) -> None:
    """Rows of benchmarks/activation.py: microseconds fused, and by separate operators."""
    journal = context.journal("8-activations")
    timer = context.timer(20, 0.05)
    layers = [case for case in context.layers() if context.dry or case.name in LAYER_NAMES]

    def jobs() -> Iterator[Job]:
        for dtype, op, case, name in itertools.product(
            ("bfloat16", "float32"), ("forward", "step"), layers, FUNCTIONS
        ):

            def job(arguments=(case, name, op, timer, dtype)):
                yield measure(*arguments) | {"dtype": arguments[-1]}

            yield f"{case} {name} {op} {dtype}", job

    journal.run(context.some(jobs()))
