"""Train a small super-resolution network (after FSRCNN) whose last layer is ours.

A low-resolution photograph goes through a few cheap convolutions, and one transposed convolution
with a 9x9 kernel and stride 3 writes the detail that bicubic interpolation lacks. Training and
test photographs are different ones; they come with scikit-image, nothing is downloaded. The
picture `<output>/super_resolution.png` shows input, result and truth side by side.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from skimage import data, util
from torch import Tensor, nn
from tqdm import tqdm

import deconv_ext

SCALE = 3
PATCH = 20  # pixels of the input
BATCH = 16
LEARNING_RATE = 4e-3


def as_tensor(image: np.ndarray) -> Tensor:
    """A photograph as [1, 3, H, W] in 0..1, cropped so that 2, 3 and 4 divide its sides."""
    height, width = (side // 12 * 12 for side in image.shape[:2])
    pixels = util.img_as_float32(image[:height, :width])
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]))


def training_photographs() -> list[Tensor]:
    left, right, _ = data.stereo_motorcycle()
    images = [left, right, data.astronaut(), data.rocket(), data.camera()]
    return [as_tensor(image) for image in images]


def test_crops() -> dict[str, Tensor]:
    """Held-out crops of photographs that the training never sees."""
    return {
        "coffee": as_tensor(data.coffee()[60:300, 130:430]),
        "chelsea": as_tensor(data.chelsea()[60:270, 90:390]),
        "coins": as_tensor(data.coins()[96:288, 36:324]),
    }


def resize(image: Tensor, scale: float) -> Tensor:
    """Bicubic, with the usual kernel (a = -0.5) and a low-pass before shrinking."""
    size = [round(side * scale) for side in image.shape[2:]]
    return F.interpolate(image, size, mode="bicubic", antialias=True)


class SuperResolution(nn.Module):
    """[N, 1, H, W] to [N, 1, scale*H, scale*W]: bicubic plus what the network adds to it."""

    def __init__(
        self,
        scale: int = SCALE,
        operator: type[nn.ConvTranspose2d] = deconv_ext.ConvTranspose2d,
        channels: int = 32,
        narrow: int = 8,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.scale = scale
        layers: list[nn.Module] = [
            nn.Conv2d(1, channels, 5, padding=2),
            nn.PReLU(channels),
            nn.Conv2d(channels, narrow, 1),
            nn.PReLU(narrow),
        ]
        for _ in range(depth):
            layers += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.PReLU(narrow)]
        layers += [nn.Conv2d(narrow, channels, 1), nn.PReLU(channels)]
        for layer in layers:
            if isinstance(layer, nn.Conv2d):  # keep the signal: training lasts a minute
                nn.init.kaiming_normal_(layer.weight, a=0.25)
        self.features = nn.Sequential(*layers)
        self.upsample: nn.Module = operator(
            channels, 1, kernel_size=9, stride=scale, padding=4, output_padding=scale - 1
        )
        nn.init.normal_(self.upsample.weight, std=1e-2)  # start near bicubic

    def forward(self, image: Tensor) -> Tensor:
        return resize(image, self.scale) + self.upsample(self.features(image - 0.5))


def luminance(image: Tensor) -> Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (image * weights).sum(dim=1, keepdim=True)


def training_pairs(degrade: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(input, truth) of every training photograph, luminance [1, 1, H, W]."""
    return [(degrade(luminance(photo)), luminance(photo)) for photo in training_photographs()]


def random_patches(
    pairs: list[tuple[Tensor, Tensor]], rng: np.random.Generator, size: int = PATCH
) -> list[Tensor]:
    """A batch (inputs, truths): patches at random places of random photographs, flipped, turned."""
    inputs: list[Tensor] = []
    truths: list[Tensor] = []
    for _ in range(BATCH):
        low, high = pairs[rng.integers(len(pairs))]
        top, left = (rng.integers(side - size + 1) for side in low.shape[2:])
        turns, flip = int(rng.integers(4)), [3] if rng.integers(2) else []
        for image, scale, patches in (
            (low, 1, inputs),
            (high, high.shape[3] // low.shape[3], truths),
        ):
            y, x, side = top * scale, left * scale, size * scale
            patch = image[..., y : y + side, x : x + side]
            patches.append(patch.rot90(turns, (2, 3)).flip(flip))
    return [torch.cat(inputs), torch.cat(truths)]


def train(
    model: nn.Module, pairs: list[tuple[Tensor, Tensor]], steps: int, seconds: float, seed: int
) -> None:
    """Adam with a learning rate that falls to zero after `steps` or, if sooner, `seconds`."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(model.parameters())
    start = time.perf_counter()
    with tqdm(range(steps), desc="training", unit="step", mininterval=0.5) as progress:
        for step in progress:
            done = max(step / steps, (time.perf_counter() - start) / seconds)
            if done >= 1:
                break
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - done)
            low, high = random_patches(pairs, rng)
            loss = F.mse_loss(model(low), high)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.2e}")


def psnr(image: Tensor, truth: Tensor) -> float:
    """In dB, without the pixels at the border, where neighbours are missing."""
    error = (image - truth)[..., SCALE:-SCALE, SCALE:-SCALE].square().mean()
    return float(-10 * torch.log10(error))


def draw(rows: dict[str, list[tuple[str, Tensor]]], path: Path) -> None:
    figure = Figure(figsize=(15, 4 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes_row, (name, pictures) in zip(grid, rows.items(), strict=True):
        for axes, (title, picture) in zip(axes_row, pictures, strict=True):
            axes.imshow(picture[0].clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_title(f"{name}: {title}")
            axes.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if the network beats bicubic interpolation on every held-out crop."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--steps", type=int, default=4000, help="training steps at most")
    parser.add_argument("--seconds", type=float, default=60, help="training time at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    model = SuperResolution()
    pairs = training_pairs(lambda photo: resize(photo, 1 / SCALE))
    train(model, pairs, options.steps, options.seconds, options.seed)

    better = True
    rows = {}
    print(f"\n{'held-out crop':<16}{'PSNR bicubic':>14}{'ours':>10}   dB, luminance")
    for name, truth in test_crops().items():
        low = resize(truth, 1 / SCALE)
        bicubic = resize(low, SCALE)
        with torch.inference_mode():  # colour is interpolated; only the luminance is learned
            ours = bicubic + (model(luminance(low)) - luminance(bicubic))
        before, after = (psnr(luminance(image), luminance(truth)) for image in (bicubic, ours))
        better &= after > before
        print(f"{name:<16}{before:>14.2f}{after:>10.2f}")
        rows[name] = [
            (f"bicubic, {before:.2f} dB", bicubic),
            (f"ours, {after:.2f} dB", ours),
            ("truth", truth),
        ]
    path = options.output / "super_resolution.png"
    draw(rows, path)
    print(f"wrote {path}")
    if not better:
        print("FAILED: the trained network does not beat bicubic interpolation", file=sys.stderr)
    return 0 if better else 1


if __name__ == "__main__":
    sys.exit(main())
