"""Time functions against each other on a machine that is not ours alone.

Neighbours slow a shared machine down for moments or minutes. So the contenders take turns, a fixed
matrix product is timed before and after every sample, and a sample counts only if both products
ran nearly as fast as the fastest seen: the rest was measured in a noisy moment.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: A sample is dropped if the product beside it took this much longer than the fastest one.
GATE = 1.15
#: Short functions are repeated, so that the clock and the product beside them weigh little.
SAMPLE_SECONDS = 1e-3
#: With fewer quiet samples than this, the fastest ones stand in for them and the row says so.
ENOUGH = 3
#: 192x192 float32 fill the L2 cache of one core and take about 100 us on two.
SIDE = 192


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median microseconds of one call, over the `quiet` of `taken` samples that count."""

    us: float
    quiet: int
    taken: int

    @property
    def noisy(self) -> bool:
        return self.quiet < ENOUGH


class Timer:
    """Compares functions on one device, for as long as it takes to get `samples` quiet samples of
    each, but not much longer than `seconds` for each of them."""

    def __init__(self, device: torch.device, samples: int = 9, seconds: float = 2.0) -> None:
        self.device, self.samples, self.seconds = device, samples, seconds
        self._left, self._right, self._product = torch.randn(3, SIDE, SIDE, device=device)
        self.fastest = math.inf  # seconds of the product
        for _ in range(50):
            self.calibrate()

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def calibrate(self) -> float:
        """Seconds of the matrix product."""
        start = self.clock()
        torch.mm(self._left, self._right, out=self._product)
        seconds = self.clock() - start
        self.fastest = min(self.fastest, seconds)
        return seconds

    def sample(self, function: Callable[[], object], calls: int) -> float:
        """Mean seconds of a call; what the function returns is freed at once."""
        start = self.clock()
        for _ in range(calls):
            function()
        return (self.clock() - start) / calls

    def compare(self, functions: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
        """The time of each function, measured in turns."""
        calls = {}
        for name, function in functions.items():
            self.sample(function, 1)  # the first call prepares caches and compiles kernels
            calls[name] = max(1, round(SAMPLE_SECONDS / self.sample(function, 1)))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
        deadline = self.clock() + self.seconds * len(functions)
        order = list(functions)
        while True:
            before = self.calibrate()
            for name in order:
                seconds = self.sample(functions[name], calls[name])
                after = self.calibrate()
                taken[name].append((seconds, max(before, after)))
                before = after
            order.reverse()  # so that nobody always follows the same one
            fewest = min(len(self._quiet(samples)) for samples in taken.values())
            if fewest >= self.samples or (
                self.clock() > deadline and len(taken[order[0]]) >= ENOUGH
            ):
                return {name: self._summary(samples) for name, samples in taken.items()}

    def _quiet(self, samples: list[tuple[float, float]]) -> list[float]:
        return [seconds for seconds, product in samples if product <= GATE * self.fastest]

    def _summary(self, samples: list[tuple[float, float]]) -> Timing:
        quiet = self._quiet(samples)
        counted = quiet
        if len(quiet) < ENOUGH:
            counted = sorted(seconds for seconds, _ in samples)[:ENOUGH]
        return Timing(1e6 * statistics.median(counted), len(quiet), len(samples))

    def machine(self) -> dict[str, float]:
        """What torch reaches here: GFLOP/s of a large product or convolution, GB/s of a copy."""
        a, b = torch.randn(2, 1024, 1024, device=self.device)
        x, w = torch.randn(8, 256, 32, 32, device=self.device), torch.randn(256, 256, 3, 3)
        x, w = (t.to(self.device, memory_format=torch.channels_last) for t in (x, w))
        source = torch.zeros(1 << 24, device=self.device)
        target = torch.zeros_like(source)

        def fastest(function: Callable[[], object]) -> float:
            return min(self.sample(function, 1) for _ in range(20))

        product = 2e-9 * 1024**3 / fastest(lambda: torch.mm(a, b))
        flops = 2e-9 * 8 * 256 * 256 * (3 * 32 - 2) ** 2
        convolution = flops / fastest(lambda: torch.conv2d(x, w, padding=1))
        copy = 2e-9 * source.nbytes / fastest(lambda: target.copy_(source))
        return {"gflops": max(product, convolution), "gbs": copy}
