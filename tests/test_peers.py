"""The comparison with other frameworks times what computes the same, and says who is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from deconv_ext import bench_contenders
from deconv_ext.testing import LAYERS, Case, Operands, make_case

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "peers.py"
CASES = (
    *(layer.reduced(200_000) for layer in LAYERS if layer.c_in * layer.c_out <= 1 << 14),
    make_case("rectangular", (2, 6, 4, 7), 9, (2, 5), (3, 2), (1, 2), (2, 1), (2, 1), groups=3),
)
QUICK = ["--layers", "^tiny$", "--samples", "1", "--seconds", "0.05"]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


peers = load()
INSTALLED = [peer for peer in peers.PEERS if peer.version]


@pytest.mark.parametrize("peer", INSTALLED, ids=lambda peer: peer.name)
def test_a_peer_computes_the_same(peer: Any) -> None:
    for case in CASES:
        t = bench_contenders.operands(case, "float32", "contiguous", torch.device("cpu"))
        want = bench_contenders.truth(case, "forward", "float32", torch.device("cpu"))
        got = peer.result(peer.prepare(case, t, 2)).double()
        assert got.shape == case.y_shape, case
        assert bench_contenders.error([got], want) < 1e-5, case


def test_the_table_the_file_and_who_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError("no such layer\nmore")

    absent = peers.Peer("Absent", "no_such_package", "contiguous", refuse)
    refusing = peers.Peer("Refusing", "json", "channels_last", refuse)
    monkeypatch.setattr(peers, "PEERS", (peers.PEERS[0], absent, refusing))
    path = tmp_path / "peers.json"
    assert peers.main([*QUICK, "--output", str(path)]) == 0
    output = capsys.readouterr().out
    assert "Absent is not installed and left out: pip install -r" in output
    assert "Refusing: declined every layer" in output
    content = json.loads(path.read_text())
    assert content["facts"]["peers"].keys() == {"ONNX Runtime", "Absent", "Refusing"}
    assert content["facts"]["peers"]["Absent"] is None
    (row,) = content["rows"]
    assert row["declined"] == {"Refusing": "NotImplementedError: no such layer"}
    who = {f"{who} {layout}" for who in ("ours", "torch") for layout in bench_contenders.LAYOUTS}
    assert row["us"].keys() == who | {"ONNX Runtime"} and min(row["us"].values()) > 0
    times = row["us"]["ONNX Runtime"] / row["us"]["ours contiguous"]
    (line,) = [line for line in output.splitlines() if line.startswith("| tiny ")]
    assert line.endswith(f"({times:.2f}x) | declined |")


def test_layers_on_which_a_peer_is_ahead_are_named() -> None:
    peer = peers.Peer("P", "json", "channels_last", None)
    rows = [
        {"layer": name, "us": {"ours channels_last": 1.0, "P": us}, "declined": {}}
        for name, us in (("a", 2.0), ("b", 0.5), ("c", 8.0))
    ]
    want = "P: 2.00x, we are ahead on 2 of 3; not on b 0.50x"
    assert peers.summary(rows, [peer]) == want


@pytest.mark.parametrize("mistake", ["values", "shape"])
def test_a_wrong_peer_is_not_timed(mistake: str) -> None:
    def prepare(case: Case, t: Operands, threads: int) -> Any:
        y = torch.nn.functional.conv_transpose2d(t.x, t.w, t.bias, **case.torch_arguments)
        return lambda: y * 1.01 if mistake == "values" else y[..., 1:]

    case = next(case for case in LAYERS if case.name == "tiny")
    wrong = peers.Peer("Wrong", "json", "contiguous", prepare)
    with pytest.raises(ValueError, match="tiny Wrong: (error|got)"):
        peers.measure(case, [wrong], None, 1)  # there is no timer to be asked
