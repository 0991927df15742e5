"""The benchmark measures what it says, drops noise, and the tables are what the JSON says."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deconv_ext import bench, bench_table
from deconv_ext.bench_timing import Timer
from deconv_ext.testing import LAYERS

QUICK = ["--layers", "^tiny$", "--samples", "1", "--seconds", "0.05"]
TINY = next(case for case in LAYERS if case.name == "tiny")


class SimulatedTimer(Timer):
    """Its machine needs 1 s for the product and for every function what the function returns, but
    everything takes ten times as long in the noisy moments: 4 of 10 turns, never the first."""

    def __init__(self, noise: Callable[[int], bool]) -> None:
        self.turn, self.noise = 0, noise
        super().__init__(torch.device("cpu"), samples=5, seconds=1e9)

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
    found = timer.compare({"a": lambda: 2e-3, "b": lambda: 3e-3})
    assert (found["a"].us, found["b"].us) == pytest.approx((2e3, 3e3))
    assert all(not timing.noisy and 5 <= timing.quiet < timing.taken for timing in found.values())


def test_a_row_without_quiet_samples_says_so() -> None:
    timer = SimulatedTimer(lambda turn: turn > 50)  # quiet only before the first measurement
    timer.seconds = -1.0  # the time is over at once
    found = timer.compare({"a": lambda: 2e-3})["a"]
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
    assert facts["machine"]["gflops"] > 1 and facts["machine"]["gbs"] > 0.1
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
    pair = bench.contenders(TINY, op, torch.float64, layout, torch.device("cpu"), "auto")
    bench.check(pair, torch.float64, op)
    found = pair["ours"]()
    found = found if isinstance(found, tuple) else (found,)
    assert found[0].requires_grad == (op == "forward_grad")
    wrong = tuple(tensor + 1e-6 * tensor.abs().max() for tensor in found)
    with pytest.raises(ValueError, match="differs"):
        bench.check({**pair, "ours": lambda: wrong}, torch.float64, op)
    with pytest.raises(ValueError, match="differs"):
        bench.check(
            {**pair, "ours": lambda: tuple(t * torch.nan for t in found)}, torch.float64, op
        )


def test_overhead_measures_the_cost_of_a_call(capsys: pytest.CaptureFixture) -> None:
    assert bench.main([*QUICK, "--overhead"]) == 0
    operations = re.findall(r"^tiny +latency +(\w+) +NCHW ", capsys.readouterr().out, re.MULTILINE)
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


def test_the_tables_of_the_readme_are_what_their_json_says() -> None:
    assert bench.main(["--check-readme", str(Path(__file__).parent.parent / "README.md")]) == 0
