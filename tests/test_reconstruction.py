"""Photographs get sharper, remedies even out the phases, and the rivals are measured fairly."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from project import ROOT
from scripts import quick

#: dB above the input that the quick mode must reach, with margin: what it does is about twice that.
GAINS = {"x2": 0.1, "x3": 0.05, "deblurring": 0.3}


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


@pytest.fixture(scope="module")
def upsampling() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return vars(importlib.import_module("upsampling"))


@pytest.mark.usefixtures("one_thread")
def test_photographs_get_sharper_and_phases_even(tmp_path: Path) -> None:
    printed = quick("examples/reconstruction.py", tmp_path)
    for task, gain in GAINS.items():
        before = float(re.search(rf"^{task}; \w+: PSNR ([\d.]+)", printed, re.MULTILINE)[1])
        lines = re.findall(rf"^{task}, (\w+) +(\w+) +(.+)$", printed, re.MULTILINE)
        found = {(remedy, operator): cells.split() for remedy, operator, cells in lines}
        plain, torchs = found["none", "deconv_ext"], found["none", "torch"]
        assert float(plain[3]) - before > gain
        assert float(torchs[3]) == pytest.approx(float(plain[3]), abs=0.02)
        # DC share: the phases of independent weights differ, those of icnr_ hardly.
        assert float(found["icnr_", "deconv_ext"][6]) < 0.25 * float(plain[6])
        assert float(found["icnr_", "deconv_ext"][3]) > before
    assert printed.count("as rounding does") == len(GAINS)
    for name in ("", "_checkerboard", "_curves"):
        assert is_picture(tmp_path / f"reconstruction{name}.png")


@pytest.mark.usefixtures("one_thread")
def test_every_rival_is_measured(tmp_path: Path, upsampling: dict[str, Any]) -> None:
    printed = quick("benchmarks/upsampling.py", tmp_path)
    found = json.loads((tmp_path / "upsampling.json").read_text())
    rows = {(row["task"].split()[0], row["rival"]): row for row in found["rows"]}
    rivals = list(upsampling["RIVALS"])
    assert [rival for task, rival in rows if task == "segmentation"] == rivals
    assert [rival for task, rival in rows if task == "super-resolution"] == rivals[:-1]
    for row in rows.values():
        numbers = [*row["quality"], *row["ripple"], row["forward_us"], row["backward_us"]]
        assert all(math.isfinite(number) and number >= 0 for number in numbers)
        assert min(row["forward_us"], row["backward_us"], row["peak_bytes"] or 1) > 0
        assert re.search(re.escape(row["measure"]) + " +" + re.escape(row["rival"]) + " ", printed)

    pixels = 16 * 20 * 20  # of the input, in a batch
    counts = {
        rival: (rows["super-resolution", rival]["parameters"], macs)
        for rival, macs in (
            ("transposed, deconv_ext", pixels * 32 * 81),
            ("sub-pixel", pixels * 32 * 9 * 9),
            ("nearest + conv", 9 * pixels * 32 * 9),
            ("bilinear + conv", 9 * pixels * 32 * (9 + 4)),
        )
    }
    assert {rival: macs for rival, (_, macs) in counts.items()} == {
        rival: rows["super-resolution", rival]["multiply_adds"] for rival in counts
    }
    assert [parameters for parameters, _ in counts.values()] == [
        *(32 * 81 + 1, 32 * 9 * 9 + 9, 32 * 9 + 1, 32 * 9 + 1)
    ]
    # On an even input interpolation and convolution make an even output, but for rounding.
    for rival in ("bilinear + conv", "nearest + conv"):
        assert max(rows["super-resolution", rival]["ripple"]) < 1e-3
    assert min(rows["super-resolution", "transposed, deconv_ext"]["ripple"]) > 1e-3
    assert is_picture(tmp_path / "upsampling.png")


@pytest.mark.parametrize("rival", ["transposed, torch", "sub-pixel", "max-unpooling + conv"])
def test_multiply_adds_are_what_torch_counts(upsampling: dict[str, Any], rival: str) -> None:
    task = upsampling["segmentation_task"](torch.device("cpu"), 1)
    model, stages = upsampling["network"](task, rival, 0)
    inputs = upsampling["stage_inputs"](model, stages, torch.rand(2, 1, 64, 64))
    with FlopCounterMode(display=False) as counter:
        for stage, x in zip(stages, inputs, strict=True):
            stage(x)
    assert upsampling["multiply_adds"](stages, inputs) == counter.get_total_flops() / 2


def test_sub_pixel_convolution_can_do_the_same(upsampling: dict[str, Any]) -> None:
    """With the weights of the transposed convolution it computes the same: a fair rival."""
    task = upsampling["segmentation_task"](torch.device("cpu"), 1)
    _, (layer, *_) = upsampling["network"](task, upsampling["OURS"], 0)
    rival = upsampling["sub_pixel"](layer)
    with torch.no_grad():
        rival[0].weight.copy_(layer.weight.movedim(0, -1).reshape(rival[0].weight.shape))
        rival[0].bias.copy_(layer.bias.repeat_interleave(4))
        x = torch.randn(1, layer.in_channels, 5, 6)
        torch.testing.assert_close(rival(x), layer(x))


def test_the_text_says_who_wins(upsampling: dict[str, Any]) -> None:
    ours = upsampling["Row"](
        *("task", "PSNR (dB)", "transposed, deconv_ext", 1, [30.0, 31.0], [1.0, 1.0]),
        *(10, 10, 10.0, 10.0, None),
    )
    torchs = dataclasses.replace(ours, rival="transposed, torch", quality=[30.01, 30.99])
    rival = dataclasses.replace(ours, rival="rival", quality=[30.1, 31.02], forward_us=9.6)
    said = upsampling["verdicts"]([ours, torchs, rival])
    assert said[0].endswith("is BEATEN by rival (30.56); level with transposed, torch (30.5)")
    assert "forward" in said[4] and "BEATEN" not in said[4]  # by 4 % only
    assert len(said) == 6  # nobody knows about the memory
    chance = dataclasses.replace(rival, quality=[30.1, 30.9], forward_us=9.0)
    said = upsampling["verdicts"]([ours, torchs, chance])
    assert "BEATEN" not in said[0]  # with one seed, not with the other
    assert "BEATEN by rival" in said[4]
