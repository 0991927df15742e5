"""The examples give the numbers that they promise, and fail where these are wrong."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import deconv_ext
from deconv_ext import demo
from scripts import quick

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


# --- those that train ----------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example by name, as a script sees itself: with its folder on the path."""
    monkeypatch.syspath_prepend(str(demo.EXAMPLES))
    return importlib.import_module


def quickly(name: str, output: Path, second: str) -> tuple[str, dict[str, list[str]]]:
    """What the quick mode of an example prints, and the cells of its table by its first two
    columns; it must draw NAME.png and NAME_SECOND.png."""
    printed = quick(f"examples/{name}.py", output)
    pictures = sorted(output.glob("*.png"))
    assert [path.name for path in pictures] == [f"{name}.png", f"{name}_{second}.png"]
    assert all(path.stat().st_size > 10_000 for path in pictures)
    rows = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    rows = [row for row in rows if len(row) > 5]
    return printed, {f"{row[0]}, {row[1]}": row[2:] for row in rows[2:]}  # header and rule


def number(cell: str) -> float:
    return float(cell.removesuffix("%"))


@pytest.mark.usefixtures("one_thread")
def test_segmentation_learns_and_the_operators_agree(tmp_path: Path) -> None:
    output, table = quickly("segmentation", tmp_path, "curves")
    assert "as rounding does" in output
    nothing = float(output.split("background alone ")[1].split()[0])
    for operator in ("deconv_ext", "torch"):
        assert number(table[f"unet, {operator}"][-1]) > IOU_BOUND > nothing


#: Measured: 0.155 with seed 0; a prediction of background alone has 0.075.
IOU_BOUND = 0.11


def test_predictions_that_miss_the_bound(example: Any) -> None:
    """The bound tells a trained network from an untrained one."""
    segmentation = example("segmentation")
    _, held_out = segmentation.glyphs()
    scenes, truth = segmentation.compose(held_out, 16, torch.Generator().manual_seed(0))
    for seed in range(3):
        torch.manual_seed(seed)
        untrained = segmentation.build("unet", "deconv_ext", "default")
        prediction = segmentation.predict(untrained, scenes)
        assert segmentation.iou(prediction, truth).mean() < IOU_BOUND


def test_iou_of_known_pixels(example: Any) -> None:
    truth = torch.tensor([0, 0, 1, 1, 2, 2]).repeat(4, 1)
    prediction = torch.tensor([0, 1, 1, 1, 2, 0]).repeat(4, 1)
    found = example("segmentation").iou(prediction, truth)
    assert found[:3].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 2])


def test_scenes_hold_digits_of_their_own_set_alone(example: Any) -> None:
    segmentation = example("segmentation")
    sets = segmentation.glyphs()
    train, held_out = ({image.numpy().tobytes() for image in images} for images, _ in sets)
    assert len(train) + len(held_out) > 1700 and not train & held_out
    images, labels = sets[1]
    sevens = images[labels == 7], labels[labels == 7]
    scenes, truth = segmentation.compose(sevens, 4, torch.Generator().manual_seed(0))
    assert truth.unique().tolist() == [0, 8] and scenes.shape == (4, 1, 64, 64)
    assert scenes[:, 0][truth == 8].mean() > 0.5 > scenes[:, 0][truth == 0].mean()


def test_heads_of_fcn_start_as_bilinear_interpolation(example: Any) -> None:
    model = example("segmentation").build("fcn", "deconv_ext", "bilinear")
    x = torch.randn(1, 11, 6, 6)
    for up in model.up:
        want = F.interpolate(x, scale_factor=2, mode="bilinear")
        torch.testing.assert_close(up(x)[..., 1:-1, 1:-1], want[..., 1:-1, 1:-1])
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 11, 64, 64)


@pytest.mark.usefixtures("one_thread")
def test_gan_learns_and_the_operators_agree(tmp_path: Path) -> None:
    output, table = quickly("gan", tmp_path, "quality")
    assert "as rounding does" in output
    for run in ("kernel 4, deconv_ext", "kernel 4, torch", "kernel 4, icnr, deconv_ext"):
        before, after = map(number, table[run][3:5])
        assert after < before / 2
    # The checkerboard in responses after training: equal phases at the start leave less of it.
    assert number(table["kernel 4, icnr, deconv_ext"][6]) < number(table["kernel 4, torch"][6]) / 2


@pytest.mark.usefixtures("one_thread")
def test_the_operators_agree_with_a_penalty(example: Any, capsys: pytest.CaptureFixture) -> None:
    gan, common = example("gan"), example("common")
    images, _ = gan.digits(torch.device("cpu"))
    options = argparse.Namespace(
        operators=["deconv_ext", "torch"], penalty=True, quick=True, seed=0, device="cpu"
    )
    runs = gan.networks(options)
    common.train(runs, gan.batches(images, gan.CRITIC_STEPS, 0), 3)
    assert common.agree(runs, 2) and "as rounding does" in capsys.readouterr().out
    assert runs[0].losses[2] < runs[0].losses[0]


def test_the_penalty_differentiates_our_operator_twice(example: Any) -> None:
    gan = example("gan")
    real, fake = torch.randn(2, 3, 1, 32, 32).double()
    gradients = []
    for layer in (deconv_ext.ConvTranspose2d, torch.nn.ConvTranspose2d):
        torch.manual_seed(0)
        critic = gan.Critic(layer, decoder=True).double()
        gan.gradient_penalty(critic, real, fake, torch.rand(3, 1, 1, 1).double()).backward()
        gradients.append([up.weight.grad for up in critic.up])
        assert all(gradient.abs().max() > 1e-6 for gradient in gradients[-1])
    torch.testing.assert_close(*gradients)


def test_frechet_distance_of_known_features(example: Any) -> None:
    """Independent features: squares of the differences of means and of standard deviations."""
    frechet = example("gan").frechet
    x = torch.randn(500, 3, dtype=torch.float64)
    x = torch.linalg.qr(x - x.mean(0))[0] * 499**0.5  # mean 0, covariance 1
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet(x, 3 * x + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(1 + 4 + 3 * 2**2)


def test_curves_that_part_are_told(example: Any, capsys: pytest.CaptureFixture) -> None:
    common = example("common")
    runs = [
        common.Run("net", name, torch.nn.Identity(), lambda batch: batch, losses, [1e-3] * 2)
        for name, losses in (("deconv_ext", [2.0, 1.0]), ("torch", [2.0, 1.01]))
    ]
    assert not common.agree(runs)
    assert "5.0e-03" in capsys.readouterr().out
    runs[1].losses[1] = 1.0 + 1e-5
    assert common.agree(runs)
