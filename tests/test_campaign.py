"""The GPU campaign: a dry run goes through every stage; crashes, hangs and cuts lose nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deconv_ext import bench, bench_table
from deconv_ext.activation import FUNCTIONS
from deconv_ext.bench_contenders import LAYOUTS, PRECISIONS
from deconv_ext.testing import EDGE, LAYERS, load_layers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from campaign import __main__ as driver  # noqa: E402
from campaign import context, correctness, probes, report, sanitizer, stages  # noqa: E402
from campaign.context import Context  # noqa: E402
from campaign.journal import RESTART, Journal  # noqa: E402

SCRIPT = str(ROOT / "benchmarks" / "gpu_campaign.sh")
Found = dict[str, dict[str, Any]]


def run_script(*arguments: str, out: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(out)}
    return subprocess.run([SCRIPT, *arguments], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and output of a dry run of all stages."""
    out = tmp_path_factory.mktemp("campaign") / "the results"
    done = run_script("10", "--dry", out=out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


@pytest.fixture(scope="module")
def found(dry: tuple[Path, str]) -> Found:
    return {name: json.loads((dry[0] / f"{name}.json").read_text()) for name in report.FILES}


@pytest.fixture
def dry_context(tmp_path: Path) -> Context:
    return Context(tmp_path, True, time.monotonic() + 60)


# --- a dry run -----------------------------------------------------------------------------------


def test_every_stage_ran_and_names_its_conditions(dry: tuple[Path, str], found: Found) -> None:
    for name, content in found.items():
        facts = content["facts"]
        for key in ("commit", "device", "date", "torch", "python", "source_hash", "dry"):
            assert key in facts, (name, key)
        assert facts["dry"] and content["jobs"], name
        assert set(content["jobs"].values()) == {"done"}, (name, content["jobs"])
    files = {path.name for path in dry[0].iterdir()}
    assert files == {f"{name}.json" for name in report.FILES} | {"summary.md", "roofline.png"}


def test_what_needs_a_gpu_is_said(dry: tuple[Path, str], found: Found) -> None:
    assert "needs a GPU, and is left out" in dry[1]
    tools = {row["tool"]: row for row in found["4-sanitizer"]["rows"]}
    assert set(tools) == {"memcheck", "racecheck", "synccheck", "initcheck"}
    for row in tools.values():
        assert row["errors"] is None and "needs a GPU" in row["why"] and row["calls"] == 100


def test_the_operators_of_every_product_are_named(found: Found) -> None:
    rows = found["1-environment"]["rows"]
    assert {row["op"] for row in rows} == set(context.PRODUCTS)
    assert {row["dtype"] for row in rows} == set(PRECISIONS)
    for row in rows:
        names = " ".join(name for name, _ in row["kernels"])
        assert "conv" in names, row
        assert all(us >= 0 for _, us in row["kernels"])
    machine = found["1-environment"]["facts"]["machine"]
    assert set(machine["gflops"]) == set(PRECISIONS) and machine["gbs"] > 0


def test_correctness_covers_kernels_derivatives_promises_and_the_suite(found: Found) -> None:
    rows = found["3-correctness"]["rows"]
    matrix = [row for row in rows if "algo" in row]
    assert {row["op"] for row in matrix} == set(context.PRODUCTS)
    assert {row["dtype"] for row in matrix} == set(PRECISIONS)
    assert any(row["algo"] not in ("auto", "reference") and row["taken"] for row in matrix)
    assert all(row["wrong"] == [] for row in matrix)
    checks = {row["check"] for row in rows if "check" in row}
    assert {"gradcheck", "gradgradcheck", "repeatable", "batch invariant", "OpInfo"} < checks
    assert {"cold call", "pytest -m 'not gpu and not slow'"} < checks
    assert all(row["ok"] is not False for row in rows if "check" in row)
    suite = next(row for row in rows if row.get("check") == "pytest -m 'not gpu and not slow'")
    assert suite["counts"]["passed"] > 0


def test_timings_are_the_rows_of_the_benchmark(dry: tuple[Path, str]) -> None:
    facts, rows = bench_table.load(dry[0] / "5-timings.json")
    assert {row.op for row in rows} == set(bench.OPERATIONS)
    assert {row.layout for row in rows} == set(LAYOUTS) and len({row.dtype for row in rows}) >= 4
    for row in rows:
        assert 0 < row.torch_best_us <= row.torch_us and row.ours_us > 0
        assert row.ours_error is not None and row.torch_error is not None
        assert row.ours_host_us and row.torch_host_us and row.compare == "tuned"
        assert row.of_roof(facts) > 0
        assert (row.rewrite_us is not None) == (
            row.kind == "kernel = stride" and row.op in ("forward", "step")
        )


def test_a_dtype_of_the_timings_can_be_selected(dry: tuple[Path, str], tmp_path: Path) -> None:
    path, out = str(dry[0] / "5-timings.json"), tmp_path / "one.json"
    dtype = bench_table.load(Path(path))[1][-1].dtype
    assert bench.main(["--load", path, "--dtype", dtype, "--output", str(out)]) == 0
    facts, rows = bench_table.load(out)
    assert rows and {row.dtype for row in rows} == {dtype} == {facts["dtype"]}
    with pytest.raises(ValueError, match="no such row"):
        bench.main(["--load", path, "--layers", "no_such_layer"])


def test_tuning_times_every_algorithm_that_takes_the_layer(found: Found) -> None:
    rows = found["6-tuning"]["rows"]
    for row in rows:
        names = set(context.algorithms(row["op"], torch.device("cpu")))
        assert set(row["us"]) | set(row["declined"]) == names
        assert {"auto", "reference"} <= set(row["us"])
        assert row["us"][row["best"]] == min(row["us"].values())
    assert any(row["declined"] for row in rows)


def test_each_part_of_a_kernel_is_probed(found: Found) -> None:
    rows = found["7-probes"]["rows"]
    choices = {(row["probe"], row["layout"], row["dtype"]) for row in rows}
    places = {(probe.case.name, probe.layout) for probe in probes.PROBES}
    assert choices == {(*place, dtype) for place in places for dtype in PRECISIONS}
    gemm = {(row["probe"], row["layout"], row["dtype"]) for row in rows if row["algo"] == "gemm"}
    assert gemm == choices  # it declines none
    for row in rows:
        assert row["algo"] in ("gemm", "winograd") and row["rate"] > 0 and row["ceiling"] > 0
        assert row["unit"] == ("TFLOP/s" if row["probe"] == "main loop" else "GB/s")


def test_activations_are_timed_fused_and_apart(found: Found) -> None:
    rows = found["8-activations"]["rows"]
    assert len(rows) > 10 and {row["op"] for row in rows} == {"forward", "step"}
    assert {row["activation"] for row in rows} == set(FUNCTIONS)
    assert all(min(row["fused_us"], row["ours_us"], row["torch_us"]) > 0 for row in rows)


def test_summary_and_picture(dry: tuple[Path, str], found: Found) -> None:
    text = (dry[0] / "summary.md").read_text()
    assert all(f"## {name}" in text for name in report.FILES) and "not run\n" not in text
    assert text.strip() in dry[1]
    assert "0 wrong" in text and "worst" in text
    assert (dry[0] / "roofline.png").read_bytes().startswith(b"\x89PNG")


# --- nothing is lost -----------------------------------------------------------------------------


def test_a_second_run_goes_on_where_the_first_was_cut(tmp_path: Path) -> None:
    done: list[str] = []

    def jobs(count: int) -> Iterator[Any]:
        for name in "abcd"[:count]:
            yield name, lambda n=name: done.append(n) or [{"name": n}]

    over = time.monotonic()
    Journal(tmp_path / "5.json", {}, over).run(jobs(4))  # begins one job at least
    assert done == ["a"]
    Journal(tmp_path / "5.json", {}, over + 60).run(jobs(4))
    assert done == ["a", "b", "c", "d"]
    content = json.loads((tmp_path / "5.json").read_text())
    assert [row["name"] for row in content["rows"]] == done
    assert content["jobs"] == dict.fromkeys(done, "done")


def test_what_fails_is_named_and_the_rest_still_runs(tmp_path: Path) -> None:
    def fail() -> Iterator[Any]:
        yield {"half": True}
        raise ValueError("too bad\nmore")

    def no_memory() -> Any:
        raise torch.OutOfMemoryError("2 TiB")

    journal = Journal(tmp_path / "3.json", {}, time.monotonic() + 60)
    journal.run([("x", fail), ("y", no_memory), ("z", lambda: [{"last": True}])])
    content = json.loads((tmp_path / "3.json").read_text())
    want = {"x": "failed: ValueError: too bad", "y": "out of memory", "z": "done"}
    assert content["jobs"] == want and content["rows"] == [{"half": True}, {"last": True}]


def test_a_job_that_killed_its_process_is_named_and_not_tried_again(tmp_path: Path) -> None:
    code = (
        "import os, sys, time, pathlib; sys.path.insert(0, 'benchmarks')\n"
        "from campaign.journal import Journal\n"
        f"path = pathlib.Path({str(tmp_path)!r}) / '3.json'\n"
        "journal = Journal(path, {}, time.monotonic() + 9)\n"
        "def crash():\n    journal.at('bad', 'case 7')\n    os.abort()\n"
        "journal.run([('good', lambda: []), ('bad', crash), ('next', lambda: [])])\n"
    )
    for expected in (-6, 0):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert done.returncode == expected
    jobs = json.loads((tmp_path / "3.json").read_text())["jobs"]
    assert jobs["good"] == jobs["next"] == "done"
    assert jobs["bad"].startswith("did not end") and jobs["bad"].endswith("case 7")


def test_a_lost_cuda_context_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    journal = Journal(tmp_path / "3.json", {}, time.monotonic() + 60)
    with pytest.raises(SystemExit) as exit:
        journal.run([("a", lost), ("b", lambda: [])])  # type: ignore[list-item]
    assert exit.value.code == RESTART
    jobs = json.loads((tmp_path / "3.json").read_text())["jobs"]
    assert list(jobs) == ["a"] and "illegal memory access" in jobs["a"]


def test_a_process_that_asks_for_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count"
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "$@" >> {count}\n[ $(wc -l < {count}) -ge 3 ] || exit 75\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    monkeypatch.setenv("OUT", str(tmp_path))
    driver.run_part(driver.PARTS[2], driver.parse(["--dry"]), 60)
    calls = count.read_text().splitlines()
    assert len(calls) == 3 and all("--part 2 --dry" in call for call in calls)


def test_a_process_without_news_is_taken_for_hanging(tmp_path: Path) -> None:
    marker = tmp_path / "3.running"
    marker.write_text("job")
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert driver.watch(process, marker, 30, 1.0) is None  # no news for a second
        assert driver.watch(process, tmp_path / "none", 1.5, 60.0) is None  # over its time
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    done = subprocess.Popen(["false"])
    assert driver.watch(done, marker, 30, 30) == 1


# --- mistakes are found --------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", [1.001, 1 + 1e-4, torch.nan], ids=["much", "little", "NaN"])
def test_the_matrix_finds_wrong_results(
    spoil: float, dry_context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = correctness.product

    def wrong(case: Any, op: str, t: Any, algo: str) -> Any:
        if algo == "reference":
            return real(case, op, t, algo)
        return lambda: real(case, op, t, algo)() * spoil

    monkeypatch.setattr(correctness, "product", wrong)
    rows = []
    journal = dry_context.journal("3-correctness")
    choice = ("forward", "auto", "float32", "contiguous")
    with pytest.raises(ValueError, match="wrong: .*integers are not exact"):
        rows += correctness.matrix(dry_context, journal, "name", *choice)
    content = correctness.matrix(dry_context, journal, "name", *choice)
    row = next(content)
    assert sum("error" in each for each in row["wrong"]) >= 3
    assert sum("exact" in each for each in row["wrong"]) >= 3 and row["taken"] >= 5


def test_a_launch_that_fails_is_named_and_the_other_cases_still_run(
    dry_context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, bad = correctness.product, dry_context.small_cases()[0]

    def fail() -> None:
        raise RuntimeError("CUDA error: invalid argument\nmore")

    def product(case: Any, op: str, t: Any, algo: str) -> Any:
        return fail if case == bad and algo == "auto" else real(case, op, t, algo)

    monkeypatch.setattr(correctness, "product", product)
    journal = dry_context.journal("3-correctness")
    choice = ("forward", "auto", "float32", "contiguous")
    row = next(correctness.matrix(dry_context, journal, "name", *choice))
    assert row["wrong"] == [f"{bad}: CUDA error: invalid argument"]
    assert row["taken"] == len(dry_context.small_cases()) - 1


def test_declined_problems_are_counted_with_a_reason(dry_context: Context) -> None:
    journal = dry_context.journal("3-correctness")
    choice = ("forward", "depthwise", "float32", "channels_last")
    (row,) = correctness.matrix(dry_context, journal, "name", *choice)
    assert row["taken"] > 0 and row["declined"] > 0 and "cannot take" in row["reason"]


FAKE = """#!/bin/sh
echo "$@" > "$(dirname "$0")/arguments"
echo "========= Invalid __global__ write of size 4 bytes"
echo "========= {summary}"
exit {code}
"""


@pytest.mark.parametrize(
    "summary,code,errors",
    [
        ("ERROR SUMMARY: 3 errors", 86, 3),
        ("RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 86, 2),
        ("ERROR SUMMARY: 0 errors", 0, 0),
        ("Target application terminated", 1, None),
        ("nothing was said", 0, None),
    ],
)
def test_the_verdict_of_the_sanitizer_is_read(
    summary: str, code: int, errors: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(FAKE.format(summary=summary, code=code))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sanitizer.find_tool() == str(tool)
    rows = sanitizer.run_tool(str(tool), "memcheck", 5.0, 30.0)
    row = next(rows)
    assert row["errors"] == errors and row["returncode"] == code
    assert "--tool memcheck" in (tmp_path / "arguments").read_text()
    if errors == 0:
        assert list(rows) == []
    else:
        with pytest.raises(RuntimeError, match="memcheck"):
            next(rows)


# --- order and options ---------------------------------------------------------------------------


def test_every_class_is_met_early_and_no_layer_is_lost() -> None:
    layers = context.by_class(load_layers("gpu"))
    kinds = {case.kind for case in LAYERS}
    assert {case.kind for case in layers[: len(kinds)]} == kinds
    assert sorted(map(str, layers)) == sorted(map(str, LAYERS))


def test_the_most_valuable_is_timed_first_and_everything_once() -> None:
    layers = context.by_class(load_layers("gpu"))
    order = context.by_value(bench.OPERATIONS, layers)
    first = order[: 2 * len(layers)]
    assert {choice[:2] for choice in first} == {("bfloat16", "forward"), ("tf32", "forward")}
    second = order[2 * len(layers) :][: 4 * len(PRECISIONS) * 8 - 2 * 8]
    assert {(op, dtype) for dtype, op, _ in second} >= {
        (op, dtype) for op in bench.OPERATIONS[1:] for dtype in PRECISIONS
    }
    assert {case for _, _, case in second} == set(layers[:8])
    assert len(order) == len(set(order)) == 4 * len(PRECISIONS) * len(layers)


def test_edge_cases_come_first_and_all_of_them_in_a_real_run(tmp_path: Path) -> None:
    cases = Context(tmp_path, False, 0.0).small_cases()
    assert tuple(cases[: len(EDGE)]) == EDGE and len(cases) > len(EDGE) + len(LAYERS)


def test_kernels_of_a_call_are_listed_in_order() -> None:
    x = torch.ones(8, 8)
    names = [name for name, _ in stages.launched(lambda: (x @ x).cos(), torch.device("cpu"))]
    assert names.index("aten::matmul") < names.index("aten::cos")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_dry_run_is_possible(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit:
        driver.parse(["5"])
    assert exit.value.code == 2 and "no CUDA device; --dry" in capsys.readouterr().err


@pytest.mark.parametrize("stages", ["9", "", "1;2"])
def test_unknown_stages_are_refused(stages: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        driver.parse(["--dry", "--stages", stages])
    assert f"want some of 1,2,3,4,5,6,7,8, got {stages!r}" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_line_instead_of_a_picture(
    dry: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    timings = dry[0] / "5-timings.json"
    (tmp_path / timings.name).write_text(timings.read_text())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report.write(tmp_path)
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert "## 2-build\n\nnot run" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "roofline.png").exists()
