"""Time functions against each other.

`GatedTimer` is for a CPU that is not ours alone: neighbours slow a shared machine down for moments
or minutes. So the contenders take turns, a fixed matrix product is timed before and after every
sample, and a sample counts only if both products ran nearly as fast as the fastest seen: the rest
was measured in a noisy moment.

`EventTimer` is for a GPU: what counts is the time between two events on its stream, with a cold
cache, and without the time in which the host prepares the call.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Function = Callable[[], Any]
#: `make(i)` gives the functions by name, on the i-th set of operands.
Make = Callable[[int], Mapping[str, Function]]

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
    spread: float = 0.0  # from the 10th to the 90th percentile, relative to the median
    host_us: float | None = None  # until the call returned, where that is not the same
    mode: str = "wall"

    @property
    def noisy(self) -> bool:
        return self.quiet < ENOUGH


def timing(seconds: Sequence[float], quiet: int, taken: int, **more: Any) -> Timing:
    """Median and spread of the samples that count."""
    middle = statistics.median(seconds)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [0]
    return Timing(1e6 * middle, quiet, taken, (tenths[-1] - tenths[0]) / middle, **more)


class Timer(abc.ABC):
    """Compares functions on one device, for as long as it takes to get `samples` samples of each,
    but not much longer than `seconds` for each of them."""

    def __init__(self, device: torch.device, samples: int, seconds: float) -> None:
        self.device, self.samples, self.seconds = device, samples, seconds

    @abc.abstractmethod
    def compare(self, make: Make) -> dict[str, Timing]:
        """The time of each function, measured in turns."""


class GatedTimer(Timer):
    """Wall time on a CPU, of quiet moments only."""

    def __init__(
        self, device: torch.device | None = None, samples: int = 9, seconds: float = 2.0
    ) -> None:
        super().__init__(device or torch.device("cpu"), samples, seconds)
        self._left, self._right, self._product = torch.randn(3, SIDE, SIDE)
        self.fastest = math.inf  # seconds of the product
        for _ in range(50):
            self.calibrate()

    def calibrate(self) -> float:
        """Seconds of the matrix product, the faster of two once its operands are in the cache: what
        was timed before it has displaced them."""
        torch.mm(self._left, self._right, out=self._product)
        seconds = math.inf
        for _ in range(2):
            start = time.perf_counter()
            torch.mm(self._left, self._right, out=self._product)
            seconds = min(seconds, time.perf_counter() - start)
        self.fastest = min(self.fastest, seconds)
        return seconds

    def sample(self, function: Function, calls: int) -> float:
        """Mean seconds of a call; what the function returns is freed at once."""
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    def compare(self, make: Make) -> dict[str, Timing]:
        functions, calls = make(0), {}
        for name, function in functions.items():
            self.sample(function, 1)  # the first call prepares caches and compiles kernels
            calls[name] = max(1, round(SAMPLE_SECONDS / self.sample(function, 1)))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
        deadline = time.perf_counter() + self.seconds * len(functions)
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
                time.perf_counter() > deadline and len(taken[order[0]]) >= ENOUGH
            ):
                return {name: self._summary(samples) for name, samples in taken.items()}

    def _quiet(self, samples: list[tuple[float, float]]) -> list[float]:
        return [seconds for seconds, product in samples if product <= GATE * self.fastest]

    def _summary(self, samples: list[tuple[float, float]]) -> Timing:
        quiet = self._quiet(samples)
        counted = quiet
        if len(quiet) < ENOUGH:
            counted = sorted(seconds for seconds, _ in samples)[:ENOUGH]
        return timing(counted, len(quiet), len(samples))


class HostEvent:
    """In place of a CUDA event where the work is done when the call returns."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds, as of CUDA's."""
        return 1e3 * (end.time - self.time)


class EventTimer(Timer):
    """Time between two events on the stream, with a cold L2 cache.

    Before every sample a buffer of several times the size of the cache is zeroed, as often as it
    takes to keep the GPU busy until the host has submitted the function: so the host's time is not
    in the sample, and is told apart. Functions shorter than `graph_below` microseconds are recorded
    in a CUDA graph, `copies` calls on as many sets of operands, for the events themselves take a
    microsecond or two.
    """

    def __init__(
        self,
        device: torch.device,
        samples: int = 100,
        seconds: float = 0.5,
        copies: int = 16,
        graph_below: float = 50.0,
    ) -> None:
        super().__init__(device, samples, seconds)
        self.copies, self.graph_below = copies, graph_below
        size = 1 << 22
        if device.type == "cuda":
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
            size = max(4 * cache, 1 << 28)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self._shuffle = random.Random(0)
        self.sample(self._buffer.zero_, 0)
        self._flush_seconds = statistics.median(self.sample(self._buffer.zero_, 0) for _ in "12345")

    def event(self) -> Any:
        if self.device.type == "cuda":
            return torch.cuda.Event(enable_timing=True)
        return HostEvent()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def submit(self, function: Function, flushes: int) -> tuple[Any, Any]:
        """Start and end of the function, as events that may still lie ahead."""
        start, end = self.event(), self.event()
        for _ in range(flushes):
            self._buffer.zero_()
        start.record()
        function()
        end.record()
        return start, end

    def sample(self, function: Function, flushes: int) -> float:
        """Seconds of one call."""
        start, end = self.submit(function, flushes)
        self.synchronize()
        return float(1e-3 * start.elapsed_time(end))

    def host_seconds(self, function: Function) -> float:
        """Until the call returns, the device idle before."""
        self.synchronize()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    def capture(self, functions: Sequence[Function]) -> Function:
        """All of them in one call, on a GPU as a CUDA graph."""
        if self.device.type != "cuda":
            return lambda: [function() for function in functions]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Results are kept until the end, so that each call writes to memory of its own.
            kept = [function() for function in functions]
        del kept
        return graph.replay

    def compare(self, make: Make) -> dict[str, Timing]:
        functions = make(0)
        host: dict[str, float] = {}
        rough: dict[str, float] = {}
        for name, function in functions.items():
            for _ in range(3):  # the first call searches, compiles and allocates
                function()
            host[name] = statistics.median(self.host_seconds(function) for _ in range(5))
            rough[name] = min(self.sample(function, self._flushes(host[name])) for _ in range(3))
        calls, mode = 1, "events"
        if 1e6 * min(rough.values()) < self.graph_below:
            sets = [functions, *(make(copy) for copy in range(1, self.copies))]
            try:
                graphs = {name: self.capture([each[name] for each in sets]) for name in functions}
            except RuntimeError as error:
                mode = f"events, for it cannot be captured: {str(error).splitlines()[0]}"
            else:
                functions, calls, mode = graphs, self.copies, "graph"
        taken = self._rounds(functions, host)
        return {
            name: timing(
                [seconds / calls for seconds in samples],
                *(len(samples), len(samples)),
                host_us=1e6 * host[name],
                mode=mode,
            )
            for name, samples in taken.items()
        }

    def _flushes(self, host: float) -> int:
        """How many cover the time of the host; one at least, for a cold cache."""
        return min(50, max(1, math.ceil(1.5 * host / self._flush_seconds)))

    def _rounds(
        self, functions: Mapping[str, Function], host: Mapping[str, float]
    ) -> dict[str, list[float]]:
        """Seconds of each function, in turns whose order is shuffled."""
        order = list(functions)
        taken: dict[str, list[float]] = {name: [] for name in order}
        deadline = time.perf_counter() + self.seconds * len(order)
        for function in functions.values():
            function()
        while len(taken[order[0]]) < self.samples:
            self._shuffle.shuffle(order)
            events = {
                name: self.submit(functions[name], self._flushes(host[name])) for name in order
            }
            self.synchronize()
            for name, (start, end) in events.items():
                taken[name].append(1e-3 * start.elapsed_time(end))
            if time.perf_counter() > deadline and len(taken[order[0]]) >= ENOUGH:
                break
        return taken
