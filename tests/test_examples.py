"""The examples that only compute and draw do so, and fail when the operator is wrong."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

import deconv_ext
from deconv_ext import demo

conv_transpose2d = deconv_ext.functional.conv_transpose2d


@pytest.fixture(scope="module")
def principle() -> dict[str, Any]:
    return runpy.run_path(str(demo.EXAMPLES / "principle.py"))


def test_all_views_agree(
    principle: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert principle["main"](["--output", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count("largest difference 0.0e+00") == 5 and output.count("true ") == 5
    assert (tmp_path / "principle.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_operator_is_found(
    principle: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel flipped in the operator itself: the mistake that the page warns of."""

    def flipped(x: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
        return conv_transpose2d(x, w.flip(-2, -1), *args, **kwargs)

    monkeypatch.setattr(deconv_ext.functional, "conv_transpose2d", flipped)
    assert principle["main"](["--output", str(tmp_path)]) == 1
