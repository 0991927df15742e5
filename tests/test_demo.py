"""The examples do their job on real input, and fail when the result is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from skimage.feature import match_template

import deconv_ext
from deconv_ext import demo


@pytest.fixture(scope="module")
def text_detection() -> dict[str, Any]:
    return runpy.run_path(str(demo.EXAMPLES / "text_detection.py"))


@pytest.fixture(scope="module")
def super_resolution() -> dict[str, Any]:
    return runpy.run_path(str(demo.EXAMPLES / "super_resolution.py"))


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 100_000


@pytest.mark.usefixtures("one_thread")
def test_converted_detector_finds_the_same_text(
    text_detection: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert text_detection["main"](["--output", str(tmp_path), "--repeats", "1"]) == 0
    output = capsys.readouterr().out
    assert "2 of 2 layers converted" in output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if " 1x3x" in line}
    # The page shows seven lines of print; the others are harder to count.
    assert rows["page"][2:4] == ["7", "7"]
    assert int(rows["text"][2]) >= 3 and int(rows["motorcycle"][2]) >= 2
    assert is_picture(tmp_path / "text_detection.png")


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_conversion_fails(
    text_detection: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(model: torch.nn.Module, sample: Any = None) -> str:
        for module in model.modules():
            if isinstance(module, torch.nn.ConvTranspose2d):
                module.weight.data.mul_(1.01)
        return "spoiled"

    monkeypatch.setattr(deconv_ext, "convert", spoil)
    assert text_detection["main"](["--output", str(tmp_path), "--repeats", "1"]) == 1


def test_boxes_of_a_known_map(text_detection: dict[str, Any]) -> None:
    """A rotated bar is found, grown by the prescribed margin; what is faint or thin is not."""
    y, x = np.mgrid[:200, :300] + 0.5
    angle = np.deg2rad(20)
    along = (x - 150) * np.cos(angle) + (y - 100) * np.sin(angle)
    across = (y - 100) * np.cos(angle) - (x - 150) * np.sin(angle)
    probability = np.where((abs(along) < 80) & (abs(across) < 10), 0.9, 0.0)
    probability[5:25, 5:60] = 0.4  # below the score
    probability[180:182, 100:200] = 0.9  # too thin
    (box,) = text_detection["find_boxes"](probability, (400, 600))
    sides = sorted(np.linalg.norm(np.diff(box[:3], axis=0), axis=1))
    margin = 1.6 * (160 * 20) / (2 * (160 + 20))  # area over perimeter, on each side
    assert sides == pytest.approx([2 * (20 + 2 * margin), 2 * (160 + 2 * margin)], abs=4)
    assert box.mean(axis=0) == pytest.approx([300, 200], abs=2)


@pytest.mark.usefixtures("one_thread")
def test_super_resolution_beats_bicubic(super_resolution: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--steps", "200", "--seconds", "600"]
    assert super_resolution["main"](arguments) == 0
    assert is_picture(tmp_path / "super_resolution.png")


def test_an_untrained_network_fails(super_resolution: dict[str, Any], tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--seconds", "1e-9"]
    assert super_resolution["main"](arguments) == 1


def test_training_and_test_photographs_are_disjoint(super_resolution: dict[str, Any]) -> None:
    def correlation(photo: torch.Tensor, crop: torch.Tensor) -> float:
        return float(
            match_template(*(image.mean(dim=1)[0].numpy() for image in (photo, crop))).max()
        )

    for crop in super_resolution["test_crops"]().values():
        assert correlation(crop, crop[..., 3:, 3:]) > 0.99
        for photo in super_resolution["training_photographs"]():
            assert correlation(photo, crop) < 0.8


def test_psnr(super_resolution: dict[str, Any]) -> None:
    image = torch.rand(1, 1, 30, 30)
    error = torch.full_like(image, 0.1)
    error[..., 0] = 5.0  # the border does not count
    assert super_resolution["psnr"](image + error, image) == pytest.approx(20, abs=1e-3)
