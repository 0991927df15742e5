"""Photographs made sharper by transposed convolutions, and their checkerboards with the remedies.

Three tasks, on the luminance of photographs that come with scikit-image:

* x2, x3: super-resolution by the network of `super_resolution.py` (after FSRCNN), whose last layer
  is a transposed convolution with a 9x9 kernel and the stride 2 or 3;
* deblurring: a Gaussian blur and the rounding to 8 bits undone by an encoder-decoder with skips,
  whose decoder is two transposed convolutions with a 3x3 kernel and the stride 2.

A 9x9 kernel with the stride 2 and a 3x3 kernel with the stride 2 overlap unevenly. So each network
is trained again with what `deconv_ext` has against checkerboards: kernels widened to a multiple of
the stride, and these with `icnr_`, all phases equal at the start.

The tables show quality on held-out photographs against the input (enlarged by bicubic
interpolation, or blurred), and the checkerboard of each network. `reconstruction.png` and
`reconstruction_checkerboard.png` in `<output>` show both as pictures.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import common
import numpy as np
import super_resolution as sr
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from skimage.filters import gaussian
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

import deconv_ext
from deconv_ext import checkerboard, init, phases

BLUR = 2.0  # standard deviation, pixels
BORDER = 6  # pixels that do not count, where neighbours are missing
GREYS = torch.linspace(0.1, 0.9, 9)


class Deblurring(nn.Module):
    """[N, 1, H, W] to the same, H and W multiples of 4: the input plus what the network adds."""

    def __init__(
        self, operator: type[nn.ConvTranspose2d] = deconv_ext.ConvTranspose2d, kernel: int = 3
    ) -> None:
        super().__init__()
        widths = (8, 16, 32)
        self.encoder = nn.ModuleList([nn.Conv2d(1, widths[0], 5, padding=2)])
        self.decoder = nn.ModuleList()
        for fine, coarse in zip(widths, widths[1:]):
            self.encoder.append(nn.Conv2d(fine, coarse, 3, stride=2, padding=1))
            up = operator(coarse, fine, kernel, stride=2, padding=1, output_padding=4 - kernel)
            self.decoder.insert(0, up)
        self.body = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
        for layer in [*self.encoder, self.body]:
            nn.init.kaiming_normal_(layer.weight)
        for layer in self.decoder:
            init.kaiming_(layer)
        self.last = nn.Conv2d(widths[0], 1, 3, padding=1)
        nn.init.normal_(self.last.weight, std=1e-2)  # start near the input

    def forward(self, image: Tensor) -> Tensor:
        x, skips = image - 0.5, []
        for layer in self.encoder:
            x = F.relu(layer(x))
            skips.append(x)
        x = F.relu(self.body(skips.pop()))
        for layer in self.decoder:
            x = F.relu(layer(x)) + skips.pop()
        return image + self.last(x)


def blur(image: Tensor) -> Tensor:
    """A Gaussian blur, and the rounding of an 8-bit file, which is what limits deblurring."""
    blurred = gaussian(image[0].numpy(), sigma=BLUR, channel_axis=0, mode="reflect")
    return torch.from_numpy(blurred)[None].mul(255).round() / 255


@dataclasses.dataclass(frozen=True)
class Task:
    """What is undone, by which network; `before` brings an input to the size of the truth."""

    name: str
    network: Callable[[type[nn.ConvTranspose2d]], nn.Module]
    degrade: Callable[[Tensor], Tensor]
    before: Callable[[Tensor], Tensor]
    baseline: str  # what `before` is called
    period: int  # of a checkerboard: product of the strides
    patch: int  # pixels of the input
    rate: float  # of learning, at most


def super_resolution_task(scale: int) -> Task:
    return Task(
        f"x{scale}",
        lambda operator: sr.SuperResolution(scale, operator),
        lambda truth: sr.resize(truth, 1 / scale),
        lambda low: sr.resize(low, scale),
        "bicubic",
        period=scale,
        patch=sr.PATCH,
        rate=sr.LEARNING_RATE,
    )


TASKS = (
    super_resolution_task(2),
    super_resolution_task(3),
    Task("deblurring", Deblurring, blur, torch.clone, "blurred", period=4, patch=36, rate=4e-3),
)


#: For the picture: (photograph, (top, left)) for each task.
DETAILS = (("chelsea", (30, 60)), ("coffee", (90, 90)), ("coins", (20, 20)))


# --- the remedies against checkerboards ----------------------------------------------------------


@torch.no_grad()
def equal_phases(layer: nn.ConvTranspose2d) -> nn.ConvTranspose2d:
    """`icnr_` in a widened kernel, as strong as the layer's own initial weights."""
    wide = checkerboard.widen(layer)
    init.icnr_(wide)
    wide.weight *= layer.weight.square().mean().sqrt() / wide.weight.square().mean().sqrt()
    return wide


REMEDIES: dict[str, Callable[[nn.ConvTranspose2d], nn.ConvTranspose2d]] = {
    "none": copy.deepcopy,
    "widen": checkerboard.widen,
    "icnr_": equal_phases,
}


def networks(
    task: Task, operators: Sequence[str], seed: int
) -> Iterator[tuple[str, str, nn.Module]]:
    """(remedy, operator, network): one for each operator, then one for each remedy that matters."""
    for remedy, change in REMEDIES.items():
        for operator in operators if remedy == "none" else operators[:1]:
            torch.manual_seed(seed)
            model = task.network(common.OPERATORS[operator])
            found = phases.layers(model)
            if remedy == "widen" and not any(
                checkerboard.unevenness(layer.kernel_size, layer.stride) for _, layer in found
            ):
                continue  # nothing to widen
            for name, layer in found:
                model.set_submodule(name, change(layer))
            yield remedy, operator, model


# --- quality -------------------------------------------------------------------------------------


@dataclasses.dataclass
class Quality:
    """Of one network, on held-out photographs; `pictures` are its results in colour."""

    pictures: dict[str, Tensor]
    scores: dict[str, tuple[float, float]]  # PSNR in dB, SSIM
    pattern: Tensor | None = None  # on even greys, see `even_ripple`

    @property
    def psnr(self) -> float:
        return statistics.fmean(psnr for psnr, _ in self.scores.values())

    @property
    def ssim(self) -> float:
        return statistics.fmean(ssim for _, ssim in self.scores.values())

    @property
    def ripple(self) -> float:
        """How strong the checkerboard on even greys is: its root mean square, levels of 255."""
        return float(self.pattern.square().mean().sqrt())


def similarity(image: Tensor, truth: Tensor) -> tuple[float, float]:
    """(PSNR in dB, SSIM) of luminance images [1, 1, H, W], without their border."""
    got, want = (
        side[0, 0, BORDER:-BORDER, BORDER:-BORDER].double().numpy() for side in (image, truth)
    )
    return (
        float(peak_signal_noise_ratio(want, got, data_range=1)),
        float(structural_similarity(want, got, data_range=1)),
    )


@torch.inference_mode()
def even_ripple(
    model: nn.Module,
    period: int,
    device: torch.device,
    output: Callable[[Tensor], Tensor] = lambda picture: picture,
) -> Tensor:
    """The checkerboard on even greys: [greys, channels, period, period], levels of 255, mean 0.

    The right answer is even too, so whatever differs between phases is the network's own. `output`
    brings what the network says to 0..1.
    """
    flat = torch.linspace(0.1, 0.9, 9, device=device).view(-1, 1, 1, 1)
    result = output(model(flat.expand(-1, 1, 128, 128).contiguous())).cpu().double()
    middle = result.shape[-1] // 2 // period * period
    one = result[..., middle : middle + period, middle : middle + period]
    return 255 * (one - one.mean(dim=(-2, -1), keepdim=True))


@torch.inference_mode()
def evaluate(model: nn.Module | None, task: Task, device: torch.device) -> Quality:
    """The held-out photographs through the network, or as they are before it for None."""
    pictures, scores = {}, {}
    for name, truth in sr.test_crops().items():
        low = task.degrade(truth)
        before = after = task.before(low)
        if model:  # colour stays as it is; only the luminance is learned
            added = model(sr.luminance(low).to(device)).cpu() - sr.luminance(before)
            after = before + added
        pictures[name] = after
        scores[name] = similarity(sr.luminance(after), sr.luminance(truth))
    return Quality(pictures, scores, even_ripple(model, task.period, device) if model else None)


def dc_share(model: nn.Module) -> float:
    """Of the transposed convolution where it is largest, see `deconv_ext.checkerboard`."""
    return max(checkerboard.dc_share(layer) for _, layer in phases.layers(model))


# --- the program ---------------------------------------------------------------------------------


def batches(
    task: Task, seed: int, device: torch.device, quick: bool = False
) -> Iterator[list[Tensor]]:
    """(inputs, truths) without end; a third of the pixels if it must be quick."""
    size = task.patch * 3 // 5 // 4 * 4 if quick else task.patch
    pairs = sr.training_pairs(task.degrade)
    rng = np.random.default_rng(seed)
    while True:
        yield [patches.to(device) for patches in sr.random_patches(pairs, rng, size)]


def train(task: Task, options: argparse.Namespace) -> list[common.Run]:
    """All networks of a task, trained in turns on the same patches; those without remedy first."""
    runs = [
        common.Run(
            f"{task.name}, {remedy}",
            operator,
            model.to(options.device),
            common.supervised(model, F.mse_loss, task.rate, options.steps),
        )
        for remedy, operator, model in networks(task, options.operators, options.seed)
    ]
    data = batches(task, options.seed, options.device, options.quick)
    common.train(runs, data, options.steps)
    return runs


def draw_pictures(found: dict[str, tuple[Quality, Quality]], path: Path) -> None:
    """A row for each task: a detail of a held-out photograph before, after, and the truth."""
    rows = []
    for task, (name, (top, left)) in zip(TASKS, DETAILS, strict=True):
        row = []
        for title, quality in zip((task.baseline, task.name), found[task.name], strict=True):
            psnr, ssim = quality.scores[name]
            row.append((f"{title}: {psnr:.2f} dB, SSIM {ssim:.3f}", quality.pictures[name]))
        row.append((f"{name}: truth", sr.test_crops()[name]))
        rows.append(
            [(title, image[0, :, top : top + 80, left : left + 120]) for title, image in row]
        )
    common.picture_grid(rows, path, width=3.6)


def draw_checkerboards(found: dict[str, dict[str, tuple[Quality, float]]], path: Path) -> None:
    """What each network adds to an even grey: a row for each task, a column for each remedy.

    `found` holds qualities and DC shares.
    """
    figure = Figure(figsize=(3.1 * len(REMEDIES), 3.2 * len(found)), layout="constrained")
    grid = figure.subplots(len(found), len(REMEDIES), squeeze=False)
    for axes_row, (task, qualities) in zip(grid, found.items(), strict=True):
        grey = len(qualities["none"][0].pattern) // 2
        patterns = {name: quality.pattern[grey, 0] for name, (quality, _) in qualities.items()}
        limit = max(float(pattern.abs().max()) for pattern in patterns.values())
        for axes, remedy in zip(axes_row, REMEDIES, strict=True):
            if remedy not in qualities:
                axes.set_axis_off()
                axes.text(0.5, 0.5, "9 is a multiple of 3:\nnothing to widen", ha="center")
                continue
            (quality, share), pattern = qualities[remedy], patterns[remedy]
            tiled = pattern.repeat(12 // pattern.shape[0], 12 // pattern.shape[1])
            picture = axes.imshow(tiled, cmap="coolwarm", vmin=-limit, vmax=limit)
            axes.set_title(
                f"{task}, {remedy}: {quality.psnr:.2f} dB\nDC share {share:.3f}, "
                f"rms {quality.ripple:.2f}",
                fontsize=10,
            )
            axes.set(xlabel="column (pixels)", ylabel="row (pixels)")
        figure.colorbar(picture, ax=axes_row, label="added to an even grey\n(levels of 255)")
    common.save(figure, path, dpi=80)


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare; 0 if every network beats its input and `icnr_` evens the phases out."""
    options = common.parse(common.parser(__doc__), argv, steps=400, quick_steps=100)
    everything: list[common.Run] = []
    before_after: dict[str, tuple[Quality, Quality]] = {}
    remedies: dict[str, dict[str, tuple[Quality, float]]] = {}
    right = True
    for task in TASKS:
        runs = train(task, options)
        before = evaluate(None, task, options.device)
        found = [evaluate(run.model, task, options.device) for run in runs]
        shares = [dc_share(run.model) for run in runs]
        columns = {
            "PSNR": [f"{quality.psnr:.2f}" for quality in found],
            "SSIM": [f"{quality.ssim:.4f}" for quality in found],
            "ripple": [f"{quality.ripple:.3f}" for quality in found],
            "DC share": [f"{share:.3f}" for share in shares],
        }
        print(f"\n{task.name}; {task.baseline}: PSNR {before.psnr:.2f}, SSIM {before.ssim:.4f}")
        print(common.table(runs, columns))
        right &= common.agree(runs)
        by_remedy: dict[str, tuple[Quality, float]] = {}
        for run, quality, share in zip(runs, found, shares, strict=True):
            remedy = run.name.removeprefix(f"{task.name}, ")
            by_remedy.setdefault(remedy, (quality, share))
            if quality.psnr <= before.psnr or quality.ssim <= before.ssim:
                right = False
                print(f"FAILED: {run.name}, {run.operator}: no better than {task.baseline}")
            if remedy != "none":
                print(
                    f"{remedy}: ripple {quality.ripple / found[0].ripple - 1:+.0%}, "
                    f"DC share {share / shares[0] - 1:+.0%}, "
                    f"PSNR {quality.psnr - found[0].psnr:+.2f} dB, "
                    f"SSIM {quality.ssim - found[0].ssim:+.4f}"
                )
        if shares[-1] >= shares[0]:  # the last remedy is icnr_
            right = False
            print("FAILED: icnr_ leaves the phases as uneven as they were")
        everything += runs
        before_after[task.name] = (before, found[0])
        remedies[task.name] = by_remedy
    print(
        "\nPSNR (dB) and SSIM: luminance, means over held-out photographs; ripple: checkerboard on "
        "even greys\n(levels of 255, rms over phases); DC share: of the weights, see "
        "deconv_ext.checkerboard.dc_share"
    )
    draw_pictures(before_after, options.output / "reconstruction.png")
    draw_checkerboards(remedies, options.output / "reconstruction_checkerboard.png")
    plain_runs = [run for run in everything if run.name.endswith(", none")]
    curves = options.output / "reconstruction_curves.png"
    common.draw_curves(plain_runs, curves, "mean squared error")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
