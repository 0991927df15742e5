"""`autotune` times each kind of call once; then every way to call takes what it has found."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import deconv_ext
from deconv_ext import tuning
from deconv_ext.bench_contenders import product
from deconv_ext.bench_timing import GatedTimer, Make, Timing
from deconv_ext.functional import conv_transpose2d
from deconv_ext.testing import EDGE, Case, make_case
from support import OPERATIONS, C, assert_same_bits, run

CASE = make_case("dense", (2, 12, 5, 7), 10, 4, 2, 1)
OTHER = "direct"  # takes CASE, though "auto" takes gemm


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    tuning.clear()


def calls_of(case: Case, op: str, layout: str = "contiguous") -> list[list[int]]:
    C.record_calls(True)
    run(op, case, case.operands(0, layout=layout))
    return C.record_calls(False)


def write(path: Path, algo: str, case: Case = CASE, **changes: Any) -> list[dict[str, Any]]:
    """A file by which each operation of the case goes to `algo`."""
    entries = [
        tuning._entry(call) | {"algo": algo, "us": {}} | changes
        for op in OPERATIONS
        for call in calls_of(case, op)
    ]
    tuning._write(path, entries)
    return entries


def used(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The recorded algorithms that calls have used since."""
    lines = capfd.readouterr().err.splitlines()
    return [line.split()[1].rstrip(",") for line in lines if line.endswith("autotune has recorded")]


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DECONV_EXT_LOG", "config")


def leaves() -> list[Tensor]:
    t = CASE.operands(0)
    return [tensor.requires_grad_() for tensor in (t.x, t.w, t.bias)]


def test_each_kind_of_call_is_timed_once(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "tuned.json"

    def step() -> list[Tensor]:
        a, w, b = leaves()
        return [*torch.autograd.grad(conv_transpose2d(a, w, b, 2, 1).sum(), (a, w, b))]

    want = step()
    with deconv_ext.autotune(path, seconds=0.01) as entries:
        for _ in range(2):
            step()
        assert entries == []  # while it lasts, calls are only put down
    assert {entry["op"] for entry in entries} == set(OPERATIONS) and len(entries) == 3
    for entry in entries:
        assert set(entry["us"]) <= {"auto", "direct", "gemm", "winograd"} and "auto" in entry["us"]
        fastest = min(entry["us"], key=entry["us"].get)
        assert entry["algo"] in (fastest, "auto") and min(entry["us"].values()) > 0
    assert json.loads(path.read_text()) == entries
    for got, wanted in zip(step(), want):
        torch.testing.assert_close(got, wanted)
    with deconv_ext.autotune(path, seconds=0.01) as again:
        step()
        torch.set_num_threads(2)
        step()
    assert [entry["threads"] for entry in again] == [2, 2, 2]
    assert json.loads(path.read_text()) == entries + again


def test_the_fastest_is_chosen_where_it_gains_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake(GatedTimer):
        us: dict[str, float] = {}

        def compare(self, make: Make) -> dict[str, Timing]:
            return {name: Timing(self.us[name], 9, 9) for name in make(0)}

    (call,) = calls_of(CASE, "forward")
    for some, algo in (
        ({"auto": 10.0, "gemm": 9.9, "direct": 9.8}, "auto"),
        ({"auto": 10.0, "gemm": 10.1, "direct": 5.0}, "direct"),
        ({"auto": 10.0, "gemm": 5.0, "direct": 6.0}, "gemm"),
    ):
        us = some | {"winograd": 11.0}
        entry, timer = tuning._entry(call), Fake(samples=1, seconds=0.0)
        timer.us = us
        monkeypatch.setattr(tuning, "_HOPELESS", 1e9)
        tuning._tune(entry, timer)
        assert (entry["algo"], entry["us"]) == (algo, us)


def test_every_way_to_call_uses_the_choice(
    tmp_path: Path, log: None, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.json", OTHER)
    assert used(capfd) == []  # nothing is read unless asked for
    assert len(tuning.load(tmp_path / "a.json")) == 3
    t = CASE.operands(0)
    y = conv_transpose2d(t.x, t.w, t.bias, 2, 1)
    assert used(capfd) == [OTHER]
    assert_same_bits(y, run("forward", CASE, t, OTHER), "forward")

    a, w, b = leaves()
    grads = torch.autograd.grad(conv_transpose2d(a, w, b, 2, 1), (a, w), t.dy)
    assert used(capfd) == [OTHER] * 3
    for op, grad in zip(OPERATIONS[1:], grads):
        assert_same_bits(grad, run(op, CASE, t, OTHER), op)

    layer = deconv_ext.ConvTranspose2d(12, 10, 4, 2, 1)
    layer(a)
    assert used(capfd) == [OTHER]
    with FlopCounterMode(display=False):  # sees operators of the dispatcher
        layer(a).backward(t.dy)
    assert used(capfd) == [OTHER] * 3
    torch.ops.deconv_ext.conv_transpose2d(t.x, t.w, None, *CASE.geometry)
    assert used(capfd) == [OTHER]
    run("forward", CASE, t, "gemm")  # who forces an algorithm gets it
    assert used(capfd) == []
    tuning.clear()
    conv_transpose2d(t.x, t.w, t.bias, 2, 1)
    assert used(capfd) == []


def test_a_choice_is_for_one_kind_of_call(
    tmp_path: Path, log: None, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.json", OTHER)
    tuning.load(tmp_path / "a.json")
    t = CASE.operands(0)

    def forward(x: Tensor, **changes: Any) -> list[str]:
        conv_transpose2d(x, t.w.to(x.dtype), None, **({"stride": 2, "padding": 1} | changes))
        return used(capfd)

    assert forward(t.x) == [OTHER]
    assert forward(t.x[:1]) == forward(t.x[..., 1:].contiguous()) == []
    assert forward(t.x.double()) == forward(t.x.contiguous(memory_format=torch.channels_last)) == []
    assert forward(t.x, padding=0) == forward(t.x, output_padding=1) == []
    torch.set_num_threads(2)
    assert forward(t.x) == []
    torch.set_num_threads(1)
    assert forward(t.x) == [OTHER]


@pytest.mark.parametrize("algo", ["gemm:of_another_version", "depthwise"])
def test_a_stale_choice_is_ignored_with_one_warning(algo: str, tmp_path: Path) -> None:
    write(tmp_path / "a.json", algo)
    tuning.load(tmp_path / "a.json")
    t = CASE.operands(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            got = conv_transpose2d(t.x, t.w, t.bias, 2, 1)
    (warning,) = caught
    assert "recorded by autotune is ignored" in str(warning.message) and algo in str(
        warning.message
    )
    assert_same_bits(got, run("forward", CASE, t), algo)
    with deconv_ext.autotune(tmp_path / "a.json", seconds=0.01) as new:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            conv_transpose2d(t.x, t.w, t.bias, 2, 1)
    assert len(new) == (algo != "depthwise")  # what does not exist is timed anew
    stale = [e["op"] for e in json.loads((tmp_path / "a.json").read_text()) if e["algo"] == algo]
    assert ("forward" in stale) == (algo == "depthwise") and "grad_input" in stale


def test_warnings_may_be_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.json", "depthwise")
    tuning.load(tmp_path / "a.json")
    t = CASE.operands(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="recorded by autotune"):
            conv_transpose2d(t.x, t.w, t.bias, 2, 1)


def test_the_default_file_and_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: None, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DECONV_EXT_CACHE", str(tmp_path))
    path = tmp_path / "tuning.json"
    assert tuning.default_path() == path
    with pytest.raises(FileNotFoundError):
        tuning.load()
    foreign = write(path, OTHER, device="Another GPU", threads=0)
    t = CASE.operands(0)
    assert tuning.load() == []
    conv_transpose2d(t.x, t.w, t.bias, 2, 1)
    assert used(capfd) == []
    with deconv_ext.autotune(seconds=0.01) as new:
        conv_transpose2d(t.x, t.w, t.bias, 2, 1)
    assert len(new) == 1 and json.loads(path.read_text()) == foreign + new


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"algo": "gemm"}]', '[{"op": "sideways"}]'], ids=repr
)
def test_a_file_of_another_kind(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    for function in (tuning.load, lambda p: deconv_ext.autotune(p).__enter__()):
        with pytest.raises(ValueError, match="path must be a file that .*a.json is not"):
            function(path)
    assert path.read_text() == text


def test_an_error_in_the_block_times_nothing(tmp_path: Path) -> None:
    t = CASE.operands(0)
    with pytest.raises(KeyError):
        with deconv_ext.autotune(tmp_path / "a.json"):
            conv_transpose2d(t.x, t.w)
            raise KeyError
    with deconv_ext.autotune(tmp_path / "a.json"):
        with pytest.raises(RuntimeError, match="cannot lie in another"):
            with deconv_ext.autotune(tmp_path / "b.json"):
                pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_entries_describe_the_calls_that_they_were_made_of(layout: str) -> None:
    """What is timed is the call itself: same problem, same strides."""
    for case in EDGE:
        for op in OPERATIONS if case.batch else ():
            (call,) = calls_of(case, op, layout)
            entry = tuning._entry(call)
            assert tuning._call(entry, -1) == tuple(call)
            same = tuning._case(entry)
            C.record_calls(True)
            product(same, op, tuning._operands(entry, same, torch.device("cpu"), 1), "auto")()
            assert C.record_calls(False) == [call], case


def test_calls_of_a_whole_network(tmp_path: Path) -> None:
    """Expanded gradients, complex numbers, unbatched and empty inputs, autocast."""
    model = nn.Sequential(deconv_ext.ConvTranspose2d(3, 5, 3, 2), nn.ReLU())
    x = torch.randn(3, 4, 4, requires_grad=True)
    want = model(x)
    with deconv_ext.autotune(tmp_path / "a.json", seconds=0.001) as entries:
        model(x).sum().backward()
        model(x[None][:0])
        with torch.autocast("cpu", torch.bfloat16):
            model(x)
        z = torch.randn(1, 2, 3, 3, dtype=torch.complex64)
        conv_transpose2d(z, torch.ones(2, 2, 2, 2).to(z), None, 2)
        conv_transpose2d(torch.ones(1, 1, 2, 2).long(), torch.ones(1, 1, 2, 2).long())
    assert {entry["dtype"] for entry in entries} == {"float32", "bfloat16", "int64"}
    assert {entry["op"] for entry in entries} == set(OPERATIONS)
    torch.testing.assert_close(model(x), want)
