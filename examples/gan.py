"""Learn to draw handwritten digits: a DCGAN, whose generator is transposed convolutions throughout.

The generator (after Radford et al. 2015, arXiv:1511.06434) takes 32 random numbers to an image of
32x32 pixels, in the manner of scikit-learn's digits. It is trained in four variants, which differ
in what is done about checkerboards: kernels of 5, no multiple of the stride 2, as they are or with
`normalize_overlap`, and kernels of 4 with independent or phase-equal (`icnr_`) initial weights.

Quality is a Frechet distance (Heusel et al. 2017, arXiv:1706.08500): that of two normal
distributions, fitted to what a small classifier of digits, trained here, computes before its last
layer for real and for generated images. Two sets of real images give the floor. The checkerboard
indices are those of `deconv_ext.checkerboard`.

`--penalty` trains as a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017,
arXiv:1704.00028): the norm of the critic's gradient enters the loss, which is then differentiated
once more. The critic has a decoder there, as in Schoenfeld et al. 2020 (arXiv:2002.12655), so that
second derivatives of our operator are taken. One variant is trained then.

`<output>/gan.png` shows samples over training, `<output>/gan_quality.png` distances and indices.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import deconv_ext
from deconv_ext import checkerboard

LATENT = 32  # random numbers that make an image
WIDTHS = (64, 32, 16)  # channels of the generator at 4x4, 8x8, 16x16; the critic mirrors them
BATCH = 32
LEARNING_RATES = 2e-3, 4e-4  # of generator and critic
CRITIC_STEPS, PENALTY = 3, 10.0  # with --penalty: per step of the generator; weight in the loss

Batch = tuple[Tensor, Tensor, Tensor]


# --- data ----------------------------------------------------------------------------------------


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """All images [1797, 1, 32, 32] in -1..1 in a random order, and which digits they show."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order].to(device), torch.from_numpy(found.target)[order].long().to(device)


def batches(images: Tensor, critic_steps: int, seed: int) -> Iterator[Batch]:
    """(real images [steps, BATCH, ...], latents [steps + 1, BATCH, LATENT], mixtures in 0..1)."""
    random = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(images), (critic_steps, BATCH), generator=random)
        latent = torch.randn(critic_steps + 1, BATCH, LATENT, generator=random)
        mixture = torch.rand(critic_steps, BATCH, 1, 1, 1, generator=random)
        yield images[chosen], latent.to(images), mixture.to(images)


# --- networks ------------------------------------------------------------------------------------


class Generator(nn.Sequential):
    """[N, LATENT] to [N, 1, 32, 32] in -1..1."""

    def __init__(self, layer: type[nn.ConvTranspose2d], kernel: int) -> None:
        geometry = {"stride": 2, "padding": (kernel - 1) // 2, "output_padding": kernel % 2}
        layers: list[nn.Module] = [nn.Unflatten(1, (LATENT, 1, 1)), layer(LATENT, WIDTHS[0], 4)]
        for channels, out_channels in zip(WIDTHS, (*WIDTHS[1:], 1)):
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
            layers += [layer(channels, out_channels, kernel, **geometry)]
        super().__init__(*layers, nn.Tanh())
        for module in self.enlarging():
            deconv_ext.init.kaiming_(module)

    def enlarging(self) -> list[nn.ConvTranspose2d]:
        """The layers with stride 2: at stride 1 there is no checkerboard."""
        return [m for m in self if isinstance(m, nn.ConvTranspose2d) and m.stride == (2, 2)]


#: Kernel size, and what is done to every layer with stride 2; the first one is plain.
VARIANTS: dict[str, tuple[int, Callable[[nn.ConvTranspose2d], object]]] = {
    "kernel 4": (4, lambda layer: layer),
    "kernel 4, icnr": (4, deconv_ext.init.icnr_),
    "kernel 5": (5, lambda layer: layer),
    "kernel 5, normalized": (5, checkerboard.normalize_overlap),
}


def build(variant: str, operator: str) -> Generator:
    kernel, remedy = VARIANTS[variant]
    model = Generator(common.OPERATORS[operator], kernel)
    for layer in model.enlarging():
        remedy(layer)
    return model


class Critic(nn.Module):
    """[N, 1, 32, 32] to [N] scores, high for real images."""

    def __init__(self, layer: type[nn.ConvTranspose2d], decoder: bool) -> None:
        super().__init__()
        widths = (1, *WIDTHS[::-1])
        pairs = list(zip(widths, widths[1:]))
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, out_channels, 4, stride=2, padding=1),
                nn.Identity() if decoder or channels == 1 else nn.BatchNorm2d(out_channels),
                nn.LeakyReLU(0.2),
            )
            for channels, out_channels in pairs
        )
        self.score = nn.Conv2d(widths[-1], 1, 4)
        self.up = nn.ModuleList(
            layer(out_channels, channels, 4, stride=2, padding=1)
            for channels, out_channels in (reversed(pairs) if decoder else ())
        )

    def forward(self, x: Tensor) -> Tensor:
        levels = [x]
        for down in self.down:
            levels.append(down(levels[-1]))
        score = self.score(x := levels.pop()).flatten()
        for up in self.up:
            x = F.leaky_relu(up(x) + levels.pop(), 0.2)
        return score + x.mean(dim=(1, 2, 3)) if self.up else score


# --- training ------------------------------------------------------------------------------------


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, mixture: Tensor) -> Tensor:
    """mean of (|d critic(x) / dx| - 1)^2 at points x between real and generated images."""
    x = torch.lerp(real, fake, mixture).requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def step_of(generator: nn.Module, critic: nn.Module, penalty: bool) -> Callable[[Batch], Tensor]:
    """A step of training: the critic once or more, then the generator. Returns the former's loss.

    With softplus(s) = log(1 + e^s), the losses without penalty are the logistic ones of DCGAN.
    """
    betas = (0.0 if penalty else 0.5, 0.9 if penalty else 0.999)
    learner, opponent = (
        torch.optim.Adam(model.parameters(), rate, betas)
        for model, rate in zip((generator, critic), LEARNING_RATES)
    )

    def step(batch: Batch) -> Tensor:
        for real, latent, mixture in zip(*batch):
            with torch.no_grad():
                fake = generator(latent)
            scores = critic(real), critic(fake)
            if penalty:
                loss = scores[1].mean() - scores[0].mean()
                loss = loss + PENALTY * gradient_penalty(critic, real, fake, mixture)
            else:
                loss = F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()
            opponent.zero_grad()
            loss.backward()
            opponent.step()
        score = critic(generator(batch[1][-1]))
        learner.zero_grad()
        (-score if penalty else F.softplus(-score)).mean().backward()
        learner.step()
        return loss.detach()

    return step


# --- quality -------------------------------------------------------------------------------------


def classifier(images: Tensor, labels: Tensor, steps: int) -> nn.Sequential:
    """A network whose last layer but one, 32 numbers, describes an image of a digit."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    ).to(images.device)
    step = common.supervised(model, nn.CrossEntropyLoss(), 3e-3, steps)
    random = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=random)
        step((images[chosen], labels[chosen]))
    return model.eval()


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean(a) - mean(b)|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances of [n, features].

    The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2).
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


@dataclasses.dataclass
class Quality:
    """Of one generator: `distance` by step; shares that are checkerboard, from 0 to 1."""

    distance: dict[int, float] = dataclasses.field(default_factory=dict)
    response: dict[int, float] = dataclasses.field(default_factory=dict)
    images: dict[int, float] = dataclasses.field(default_factory=dict)

    def measure(self, step: int, model: Generator, features: nn.Module, *sets: Tensor) -> Tensor:
        """Measure what `model` makes of the first of `sets`, latents, against features of real
        images, the second; returns the generated images."""
        latent, target = sets
        with torch.inference_mode():
            images = model.eval()(latent)
            model.train()
            self.distance[step] = frechet(features(images), target)
        self.response[step] = max(map(checkerboard.dc_share, model.enlarging()))
        self.images[step] = checkerboard.spectral_share(images, 2)
        return images


# --- the example ---------------------------------------------------------------------------------


def networks(options: argparse.Namespace) -> list[common.Run]:
    """The plain variant with all operators, the others with the first one: with --quick the next
    one alone, with --penalty none."""
    plain, *others = VARIANTS
    others = [] if options.penalty else others[:1] if options.quick else others
    chosen = [(plain, operator) for operator in options.operators]
    chosen += [(variant, options.operators[0]) for variant in others]
    runs = []
    for variant, operator in chosen:
        torch.manual_seed(options.seed)
        generator = build(variant, operator).to(options.device)
        critic = Critic(common.OPERATORS[operator], options.penalty).to(options.device)
        step = step_of(generator, critic, options.penalty)
        runs.append(common.Run(variant, operator, generator, step))
    return runs


def draw_quality(found: dict[str, Quality], floor: float, real_share: float, path: Path) -> None:
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.2, 1, 1])

    def curves(axes: Axes, values: str, level: float, real: str, label: str) -> None:
        for name, quality in found.items():
            style = "--" if name.endswith("torch") else "-"
            axes.plot(*zip(*getattr(quality, values).items()), style, marker=".", label=name)
        axes.axhline(level, color="gray", ls=":", label=real)
        axes.set(xlabel="training step", ylabel=label, yscale="log")

    curves(left, "distance", floor, "real to real images", "Frechet distance")
    left.set_title("quality: less is better")
    left.legend(fontsize=8)
    rows = range(len(found))
    for offset, label, at in ((-0.2, "before training", 0), (0.2, "after", -1)):
        shares = [list(quality.response.values())[at] for quality in found.values()]
        middle.barh([row + offset for row in rows], shares, 0.4, label=label)
    middle.set(xlabel="share of energy", title="checkerboard in responses to constants")
    middle.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
    middle.set_yticks(rows, list(found), fontsize=8)
    middle.invert_yaxis()
    curves(right, "images", real_share, "real images", "share of variance")
    right.set_title("checkerboard in images")
    common.save(figure, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure; 0 if training brought all images closer and both operators agree."""
    parser = common.parser(__doc__)
    parser.add_argument("--penalty", action="store_true", help="WGAN-GP: differentiate twice")
    options = common.parse(parser, argv, steps=400, quick_steps=50)
    images, labels = digits(options.device)
    train, held_out = images.tensor_split(2)
    torch.manual_seed(options.seed)
    features = classifier(images, labels, 100 if options.quick else 400)[:-1]
    with torch.inference_mode():
        target = features(held_out)
        floor = frechet(features(train), target)
    random = torch.Generator().manual_seed(options.seed + 1)
    drawn_count = 300 if options.quick else len(held_out)
    latent = torch.randn(drawn_count, LATENT, generator=random).to(images)

    runs = networks(options)
    found = {f"{run.name}, {run.operator}": Quality() for run in runs}
    parts = (0, 0.5, 1) if options.quick else (0, 0.1, 0.2, 0.4, 0.7, 1)
    marks = {round(options.steps * part) for part in parts}
    rows = []

    def measure(step: int) -> None:
        if step in marks:
            drawn = [
                quality.measure(step, run.model, features, latent, target)
                for run, quality in zip(runs, found.values())
            ]
            rows.append([(f"step {step}", common.tile(drawn[0][:16] / 2 + 0.5, 16))])

    measure(0)
    data = batches(train, CRITIC_STEPS if options.penalty else 1, options.seed)
    common.train(runs, data, options.steps, measure)

    real_share = checkerboard.spectral_share(held_out, 2)
    columns = {
        "distance before": [f"{q.distance[0]:.1f}" for q in found.values()],
        "distance after": [f"{q.distance[options.steps]:.1f}" for q in found.values()],
        "response before": [f"{q.response[0]:.2%}" for q in found.values()],
        "response after": [f"{q.response[options.steps]:.2%}" for q in found.values()],
        "images before": [f"{q.images[0]:.2%}" for q in found.values()],
        "images after": [f"{q.images[options.steps]:.3%}" for q in found.values()],
    }
    print()
    notes = (
        f"distance: Frechet, to held-out images; that of other real images is {floor:.1f}",
        "response: checkerboard in the answer to constant inputs, the worst layer",
        f"images: checkerboard in generated images; in real ones {real_share:.3%}",
    )
    print(common.table(runs, columns, *notes))
    # A step updates the critic once or more, then the generator: differences grow with each.
    updates = 1 + (CRITIC_STEPS if options.penalty else 1)
    agreed = common.agree(runs, common.COMPARED_STEPS // updates)
    rows.append([("real", common.tile(held_out[:16] / 2 + 0.5, 16))])
    common.picture_grid(rows, options.output / "gan.png", 9)
    draw_quality(found, floor, real_share, options.output / "gan_quality.png")

    better = all(q.distance[options.steps] < q.distance[0] / 2 for q in found.values())
    if not better:
        print("FAILED: training did not bring the images closer to real ones", file=sys.stderr)
    return 0 if better and agreed else 1


if __name__ == "__main__":
    sys.exit(main())
