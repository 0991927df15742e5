"""Stage 7: the parts that bound the matrix kernels, each by a problem that is little else."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from deconv_ext.bench_contenders import PRECISIONS, operands, precision_setting, product
from deconv_ext.testing import Case, make_case

from .context import ORDER, Context, algorithms, shrunk
from .journal import Job, Row, context_lives


class Probe(NamedTuple):
    """A problem, and what its time is to be divided into: "macs", or the bytes of "x" or "y"."""

    case: Case
    layout: str
    bound: str


# Of the main loop: each staged pixel meets 49 taps, each weight 50 000 pixels. Of a loader or a
# store: the other side has eight channels, the fewest that fill a 16-byte vector of 16 bits.
_LOOP = make_case("main loop", (16, 256, 56, 56), 256, 7, 1, 3)
_LOAD = make_case("loader", (32, 512, 64, 64), 8, 1)
_STORE = make_case("store", (32, 8, 32, 32), 512, 2, 2)
PROBES = (
    Probe(_LOOP, "channels_last", "macs"),  # by 16-byte asynchronous copies, the cheapest loader
    Probe(_LOAD, "channels_last", "x"),  # 16-byte asynchronous copies
    Probe(_LOAD, "contiguous", "x"),  # through registers in 16 bits, else 4 or 8 bytes a copy
    Probe(_STORE, "channels_last", "y"),
    Probe(_STORE, "contiguous", "y"),
)


def probes(context: Context, _: str) -> None:
    """Rates of every matrix algorithm and configuration, beside those of torch's copy and product.

    A row has `rate`: TFLOP/s of the main loop, else GB/s; `ceiling`: what torch's matmul or copy_
    reached in this dtype, in the same unit.
    """
    journal = context.journal("7-probes", machine=context.ceilings())
    timer = context.timer(20, 0.05)

    def measure(probe: Probe, precision: str) -> Iterator[Row]:
        case = shrunk(probe.case) if context.dry else probe.case
        functions: dict[str, Any] = {}
        with precision_setting(precision):
            t = operands(case, precision, probe.layout, context.device)
            for algo in algorithms("forward", context.device):
                if algo.split(":")[0] in ("auto", "direct", "generic", "reference"):
                    continue
                function = product(case, "forward", t, algo)
                try:
                    function()
                except RuntimeError:
                    if not context_lives():
                        raise
                    continue
                functions[algo] = function
            found = timer.compare(lambda copy: functions) if functions else {}
        machine = journal.facts["machine"]
        if probe.bound == "macs":
            work, ceiling = 2e-6 * case.macs, machine["gflops"][precision] / 1e3
        else:
            numbers = t.x if probe.bound == "x" else t.dy
            work = 1e-3 * numbers.numel() * PRECISIONS[precision].itemsize
            ceiling = machine["gbs"]
        for algo, timing in found.items():
            names = {"probe": case.name, "layout": probe.layout, "dtype": precision, "algo": algo}
            rate = {"us": timing.us, "rate": work / timing.us, "ceiling": ceiling}
            yield names | rate | {"unit": "TFLOP/s" if probe.bound == "macs" else "GB/s"}

    def jobs() -> Iterator[Job]:
        for probe, precision in itertools.product(PROBES, ORDER):
            name = f"{probe.case} {probe.layout} {precision}"
            yield name, lambda c=(probe, precision): measure(*c)

    journal.run(jobs())
