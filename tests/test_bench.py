"""The benchmark measures what it says, drops noise, and the tables are what the JSON says."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from deconv_ext import bench, bench_contenders, bench_machine, bench_table
from deconv_ext.bench_timing import EventTimer, GatedTimer
from deconv_ext.testing import LAYERS, make_case

QUICK = ["--layers", "^tiny$", "--samples", "1", "--seconds", "0.05"]
CPU = torch.device("cpu")
TINY = next(case for case in LAYERS if case.name == "tiny")


class SimulatedTimer(GatedTimer):
    """Its machine needs 1 s for the product and for every function what the function returns, but
    everything takes ten times as long in the noisy moments: 4 of 10 turns, never the first."""

    def __init__(self, noise: Callable[[int], bool]) -> None:
        self.turn, self.noise = 0, noise
        super().__init__(CPU, samples=5, seconds=1e9)

    def calibrate(self) -> float:
        self.turn += 1
        self.fastest = min(self.fastest, 1.0)
        return self._slowdown()

    def sample(self, function: Callable[[], object], calls: int) -> float:
        return self._slowdown() * float(function())  # type: ignore[arg-type]

    def _slowdown(self) -> float:
        return 10.0 if self.noise(self.turn) else 1.0


def test_noisy_samples_do_not_count() -> None:
    timer = SimulatedTimer(lambda turn: turn % 10 >= 6)
    found = timer.compare(lambda _: {"a": lambda: 2e-3, "b": lambda: 3e-3})
    assert (found["a"].us, found["b"].us) == pytest.approx((2e3, 3e3))
    assert all(not timing.noisy and 5 <= timing.quiet < timing.taken for timing in found.values())


def test_a_row_without_quiet_samples_says_so() -> None:
    timer = SimulatedTimer(lambda turn: turn > 50)  # quiet only before the first measurement
    timer.seconds = -1.0  # the time is over at once
    found = timer.compare(lambda _: {"a": lambda: 2e-3})["a"]
    assert found.noisy and found.quiet == 0 and found.taken == 3
    assert found.us == pytest.approx(2e4)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a quick run over one layer."""
    path = tmp_path_factory.mktemp("bench") / "deep" / "result.json"
    assert bench.main([*QUICK, "--output", str(path)]) == 0
    return path


def test_run_measures_every_operation_and_layout(result: Path) -> None:
    facts, rows = bench_table.load(result)
    assert {(row.op, row.layout) for row in rows} == {
        (op, layout) for op in bench.OPERATIONS for layout in bench.LAYOUTS
    }
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert facts["machine"]["gflops"]["float32"] > 0 and facts["machine"]["gbs"] > 0
    for row in rows:
        work = 3 if row.op == "step" else 1
        assert row.flops == 2 * work * TINY.macs
        assert 0 < row.ours_us < 1e6 and 0 < row.torch_best_us <= row.torch_us < 1e6
        assert row.ratio == row.torch_us / row.ours_us >= row.best_ratio
        assert row.gflops == pytest.approx(row.flops / (row.ours_us * 1e-6) / 1e9)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_dtypes_and_forced_algorithms_run(dtype: str, capsys: pytest.CaptureFixture) -> None:
    assert bench.main([*QUICK, "--dtype", dtype, "--ops", "forward", "--algo", "reference"]) == 0
    output = capsys.readouterr().out
    assert dtype in output and len(re.findall(r"^tiny .*forward", output, re.MULTILINE)) == 2


def test_an_unknown_algorithm_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match="no_such_thing"):
        bench.main([*QUICK, "--algo", "no_such_thing"])


@pytest.mark.parametrize("layout", bench.LAYOUTS)
@pytest.mark.parametrize("op", [*bench.OPERATIONS, "forward_grad"])
def test_contenders_compute_the_same_and_a_wrong_one_is_refused(op: str, layout: str) -> None:
    found = bench_contenders.contenders(TINY, op, "float64", layout, CPU)
    want = bench_contenders.truth(TINY, op, "float64", CPU)
    for name, function in found.items():
        bench_contenders.check(
            bench_contenders.error(bench_contenders.results(function), want), "float64", name
        )
    ours = found["ours"]()
    ours = ours if isinstance(ours, tuple) else (ours,)
    assert ours[0].requires_grad == (op == "forward_grad")
    assert ours[0].is_contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    for spoil in (1e-6, torch.nan):
        wrong = (*want[:-1], want[-1] + spoil * want[-1].abs().max())
        with pytest.raises(ValueError, match="more than 1e-09"):
            bench_contenders.check(bench_contenders.error(wrong, want), "float64", op)


@pytest.mark.parametrize("layout", bench.LAYOUTS)
@pytest.mark.parametrize("op", ["forward", "step"])
@pytest.mark.parametrize("kernel", [2, 4])
def test_the_rewrite_as_a_product_computes_the_same(kernel: int, op: str, layout: str) -> None:
    case = make_case("c", (2, 5, 3, 4), 7, kernel, kernel)
    found = bench_contenders.contenders(case, op, "float64", layout, CPU)
    want = bench_contenders.truth(case, op, "float64", CPU)
    assert bench_contenders.error(bench_contenders.results(found["rewrite"]), want) < 1e-12


def test_layers_with_a_rewrite_are_those_whose_kernel_is_the_stride() -> None:
    found = {case.name for case in LAYERS if bench_contenders.can_rewrite(case)}
    named = {case.name for case in LAYERS if case.kind == "kernel = stride"}
    assert found == named | {"dbnet_64_1"}
    assert not bench_contenders.can_rewrite(make_case("c", (1, 2, 3, 3), 2, (2, 3), (2, 3)))
    assert not bench_contenders.can_rewrite(make_case("c", (1, 2, 3, 3), 2, 2, 2, 1))


def test_precisions_and_the_search_of_cudnn_are_set_and_restored() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    with bench_contenders.precision_setting("tf32"):
        assert torch.backends.cudnn.conv.fp32_precision == "tf32"
        with bench_contenders.precision_setting("float32"):
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cudnn.conv.fp32_precision == before
    if torch.backends.cudnn.is_available():
        with bench_contenders.cudnn_search(True):
            assert torch.backends.cudnn.benchmark and torch.backends.cudnn.benchmark_limit == 0
        with bench_contenders.cudnn_search(False):
            assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("options", [["--dtype", "tf32"], ["--compare", "tuned"]], ids=str)
def test_what_needs_a_gpu_is_refused_on_the_cpu(options: list[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main([*QUICK, *options])


class SimulatedEvent:
    """Reads the clock of a simulated device that runs behind the host."""

    def __init__(self, device: SimulatedGpu) -> None:
        self.device = device

    def record(self) -> None:
        self.time = max(self.device.busy_until, self.device.now)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return 1e3 * (end.time - self.time)


class SimulatedGpu(EventTimer):
    """A host that needs 100 us a call, and a device on which a flush takes 60 us, a cold call what
    the function says and a call straight after another of its own a tenth of that."""

    def __init__(self, **options: float) -> None:
        self.now = self.busy_until = 0.0
        self.cold = True
        self.calls: list[str] = []
        super().__init__(CPU, 5, 1e9, **options)  # type: ignore[arg-type]
        self._flush_seconds = 60e-6
        self._buffer = self  # its zero_ is that of the device

    def zero_(self) -> None:
        self.cold = True
        self.busy_until = max(self.busy_until, self.now) + 60e-6

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self)

    def synchronize(self) -> None:
        self.now = max(self.now, self.busy_until)

    def host_seconds(self, function: Callable[[], object]) -> float:
        self.synchronize()
        before = self.now
        function()
        return self.now - before

    def make(self, **seconds: float) -> Callable[[int], dict[str, Callable[[], object]]]:
        """Functions that take so long, on sets of operands that are told apart."""
        last: list[object] = [None]

        def make(copy: int) -> dict[str, Callable[[], object]]:
            def call(name: str) -> None:
                self.calls.append(name)
                self.now += 100e-6
                warm = last[0] == (name, copy) and not self.cold
                last[0], self.cold = (name, copy), False
                took = seconds[name] * (0.1 if warm else 1)
                self.busy_until = max(self.busy_until, self.now) + took

            return {name: functools.partial(call, name) for name in seconds}

        return make

    def capture(self, functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
        def replay() -> None:
            host = self.now
            for function in functions:
                function()
            self.now = host  # a graph costs the host nothing here

        return replay


def test_event_times_are_those_of_the_device_with_a_cold_cache() -> None:
    gpu = SimulatedGpu()
    found = gpu.compare(gpu.make(a=200e-6, b=300e-6))
    assert (found["a"].us, found["b"].us) == pytest.approx((200, 300))
    assert found["a"].host_us == pytest.approx(100) and found["a"].mode == "events"
    assert found["a"].taken == 5 and not found["a"].noisy and found["a"].spread < 1e-6
    rounds = ["".join(pair) for pair in zip(gpu.calls[-10::2], gpu.calls[-9::2])]
    assert {"ab", "ba"} == set(rounds), "the order changes"


def test_short_functions_are_timed_as_a_graph_of_cold_calls() -> None:
    gpu = SimulatedGpu()
    found = gpu.compare(gpu.make(a=10e-6, b=300e-6))
    assert (found["a"].us, found["b"].us) == pytest.approx((10, 300))
    assert found["a"].mode == found["b"].mode == "graph"


def test_a_function_that_cannot_be_captured_is_timed_with_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def capture(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(SimulatedGpu, "capture", capture)
    gpu = SimulatedGpu()
    found = gpu.compare(gpu.make(a=10e-6))["a"]
    assert found.us == pytest.approx(10)
    assert found.mode.endswith("not permitted when stream is capturing")


def test_events_on_the_cpu_time_the_call() -> None:
    timer = EventTimer(CPU, 3, 1.0, copies=2)
    found = timer.compare(lambda _: {"sleep": lambda: time.sleep(2e-3)})["sleep"]
    assert 2e3 <= found.us < 1e5 and found.host_us is not None and found.mode == "events"


def test_ceilings_are_bytes_and_operations_over_the_fastest_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = itertools.cycle([9e-3, 1e-3, 2e-3])

    def sample(_: EventTimer, function: Callable[[], object], flushes: int) -> float:
        function()
        return next(times)

    monkeypatch.setattr(EventTimer, "sample", sample)
    found = bench_machine.ceilings(CPU, ("float32", "float64"), 64, 1, 60.0)
    gflops = pytest.approx(2 * 64**3 / 1e-3 / 1e9)
    assert found["gflops"] == {"float32": gflops, "float64": gflops}
    assert found["gbs"] == pytest.approx(2 * 2**20 / 1e-3 / 1e9)  # read and written


def test_overhead_measures_the_cost_of_a_call(capsys: pytest.CaptureFixture) -> None:
    assert bench.main([*QUICK, "--overhead"]) == 0
    output = capsys.readouterr().out
    operations = re.findall(r"^tiny +latency +(\w+) +float32 +NCHW ", output, re.MULTILINE)
    assert operations == ["forward", "forward_grad", "step"]


def test_check_fails_below_the_ratio(result: Path, tmp_path: Path) -> None:
    facts, rows = bench_table.load(result)
    path = tmp_path / "slow.json"
    slow = dataclasses.replace(rows[0], ours_us=100.0, torch_us=40.0)
    fast = dataclasses.replace(rows[1], ours_us=1.0, torch_us=40.0)
    bench_table.save(path, facts, [slow, fast])
    assert bench.main(["--load", str(path), "--check", "0.5"]) == 1
    assert bench.main(["--load", str(path), "--check", "0.4"]) == 0


def test_geomean_and_worst_in_the_summary(result: Path) -> None:
    _, rows = bench_table.load(result)
    two = [
        dataclasses.replace(rows[0], layer=name, kind="k", ours_us=1.0, torch_us=us)
        for name, us in (("a", 2.0), ("b", 8.0))
    ]
    assert re.search(r"all +4\.00 .*worst 2\.00 a", bench_table.summary(two))


def test_readme_table_is_what_the_json_says(result: Path, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    copy = tmp_path / "results" / "r.json"
    copy.write_text(result.read_text())
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- benchmark: results/r.json -->\n<!-- /benchmark -->\nz\n")
    assert bench.main(["--check-readme", str(readme)]) == 1
    assert bench.main(["--update-readme", str(readme)]) == 0
    assert bench.main(["--check-readme", str(readme)]) == 0
    text = readme.read_text()
    facts, rows = bench_table.load(copy)
    assert text.startswith("a\n<!-- bench") and text.endswith("<!-- /benchmark -->\nz\n")
    assert f"| {rows[0].ours_us:.0f} ({rows[0].ratio:.2f}x) |".replace("| ~", "| ") in text.replace(
        "| ~", "| "
    )
    faster = [dataclasses.replace(row, ours_us=row.ours_us / 2) for row in rows]
    bench_table.save(copy, facts, faster)
    assert bench.main(["--check-readme", str(readme)]) == 1
    readme.write_text("no table")
    with pytest.raises(ValueError, match="no <!-- benchmark"):
        bench.main(["--check-readme", str(readme)])


def test_saved_json_is_complete(result: Path, tmp_path: Path) -> None:
    facts, rows = bench_table.load(result)
    for key in ("date", "commit", "device", "threads", "dtype", "torch", "isa", "machine"):
        assert key in facts
    again = tmp_path / "again.json"
    bench_table.save(again, facts, rows)
    assert json.loads(again.read_text()) == json.loads(result.read_text())


def test_plot_draws_bars_and_roofline(result: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plot.png"
    assert bench.main(["--load", str(result), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@pytest.mark.parametrize("page", ("README.md", "docs/tuning.md"))
def test_the_tables_of_the_documentation_are_what_their_json_says(page: str) -> None:
    assert bench.main(["--check-readme", str(Path(__file__).parent.parent / page)]) == 0
