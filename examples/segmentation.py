"""Segment scenes of handwritten digits: which pixels belong to a 0, a 1, ..., and which to none.

Each scene holds several of scikit-learn's digits, scaled, turned, partly over one another, on a
background with gradient, noise and strokes as bright as the digits. It is composed here, so that
the label of every pixel is exact. Digits of held-out scenes never occur in training scenes.

Two networks with transposed convolutions in the decoder:

* unet (Ronneberger et al. 2015, arXiv:1505.04597): 2x2 kernels with stride 2 enlarge features,
  which are joined to those of the encoder;
* fcn (Long et al. 2015, arXiv:1411.4038): 4x4 kernels with stride 2 enlarge class scores, to which
  those of a finer level are added; `--init bilinear` starts them as bilinear interpolation.

Quality is the mean intersection over union (IoU) of the eleven classes, background included, on
held-out scenes. `<output>/segmentation.png` shows input, prediction and truth.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from sklearn.datasets import load_digits
from torch import Tensor, nn

import deconv_ext

CLASSES = 11  # 0 is background, 1 + d the digit d
SIZE = 64  # of a scene, pixels
CELLS = 3  # on each axis of a scene; a digit lies about the middle of a cell
DIGITS, STROKES = 6, 8  # per scene
BATCH = 16
LEARNING_RATE = 2e-2
BACKGROUND_WEIGHT = 0.3  # in the loss: three pixels of four are background
COLOURS = torch.tensor([(0.0, 0.0, 0.0), *colormaps["tab10"].colors])

Glyphs = tuple[Tensor, Tensor]  # images [n, 1, 8, 8] in 0..1, digits [n]


# --- scenes --------------------------------------------------------------------------------------


def glyphs() -> tuple[Glyphs, Glyphs]:
    """The digits for training scenes and those for held-out scenes."""
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[: len(order) * 3 // 4], order[len(order) * 3 // 4 :]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def compose(source: Glyphs, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` scenes [count, 1, SIZE, SIZE] and the classes of their pixels [count, SIZE, SIZE]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    # Coordinates run from -1 to 1, as F.affine_grid has them.
    axis = (torch.arange(SIZE) + 0.5) * (2 / SIZE) - 1
    y, x = axis[:, None], axis
    slope = uniform(-0.1, 0.1, 2, 1, 1)
    scenes = uniform(0.1, 0.3, 1, 1) + slope[:, 0] * x + slope[:, 1] * y
    truth = torch.zeros(count, SIZE, SIZE, dtype=torch.long)

    ends, middle = uniform(-0.25, 0.25, STROKES, 2, 1, 1), uniform(-1, 1, STROKES, 2, 1, 1)
    ahead, across = x - middle[:, :, 0], y - middle[:, :, 1]
    length = ends.square().sum(2)
    along = ((ahead * ends[:, :, 0] + across * ends[:, :, 1]) / length).clamp(-1, 1)
    distance = torch.hypot(ahead - along * ends[:, :, 0], across - along * ends[:, :, 1])
    ink = (1.5 - distance * SIZE / 2).clamp(0, 1)  # strokes are two to three pixels wide
    scenes = _paint(scenes, ink, uniform(0.5, 1.0, STROKES))

    chosen = torch.randint(len(source[1]), (count, DIGITS), generator=random)
    side, angle = uniform(0.27, 0.36, DIGITS), uniform(-0.4, 0.4, DIGITS)
    cell = torch.rand(count, CELLS**2, generator=random).argsort(1)[:, :DIGITS]
    middle = torch.stack([cell % CELLS, cell // CELLS], dim=2)[..., None] * 2 + 1
    centre = middle / CELLS - 1 + uniform(-0.07, 0.07, DIGITS, 2, 1)
    cosine, sine = angle.cos() / side, angle.sin() / side
    turn = torch.stack([cosine, sine, -sine, cosine], dim=2).unflatten(2, (2, 2))
    place = torch.cat([turn, -turn @ centre], dim=3).flatten(0, 1)
    grid = F.affine_grid(place, [count * DIGITS, 1, SIZE, SIZE], align_corners=False)
    ink = F.grid_sample(source[0][chosen.flatten()], grid, align_corners=False)
    ink = (2 * ink.view(count, DIGITS, SIZE, SIZE) - 0.5).clamp(0, 1)
    scenes = _paint(scenes, ink, uniform(0.6, 1.0, DIGITS))
    for i in range(DIGITS):
        label = 1 + source[1][chosen[:, i], None, None]
        truth = torch.where(ink[:, i] > 0.5, label, truth)

    noise = 0.06 * torch.randn(scenes.shape, generator=random)
    return (scenes + noise).clamp(0, 1)[:, None], truth


def _paint(scenes: Tensor, ink: Tensor, brightness: Tensor) -> Tensor:
    """Scenes [n, H, W] with one layer of ink [n, layers, H, W] after the other put over them."""
    for i in range(ink.shape[1]):
        scenes = torch.lerp(scenes, brightness[:, i, None, None].expand_as(scenes), ink[:, i])
    return scenes


def batches(
    source: Glyphs, size: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    while True:
        scenes, truth = compose(source, size, random)
        yield scenes.to(device), truth.to(device)


# --- networks ------------------------------------------------------------------------------------


def block(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Segmenter(nn.Module):
    """The encoder of both networks: [N, 1, H, W] to class scores [N, CLASSES, H, W]."""

    WIDTHS = (8, 24, 48, 96)  # channels, at strides 1, 2, 4 and 8

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(
            block(before, width) for before, width in zip((1, *self.WIDTHS[:-1]), self.WIDTHS)
        )

    def encode(self, x: Tensor) -> list[Tensor]:
        """Features of every level, the coarsest last."""
        levels: list[Tensor] = []
        for stage in self.encoder:
            x = stage(F.max_pool2d(x, 2) if levels else x)
            levels.append(x)
        return levels


class UNet(Segmenter):
    def __init__(self, layer: type[nn.ConvTranspose2d]) -> None:
        super().__init__()
        steps = list(zip(self.WIDTHS[::-1], self.WIDTHS[-2::-1]))  # (coarse, fine)
        self.up = nn.ModuleList(layer(coarse, fine, 2, stride=2) for coarse, fine in steps)
        self.merge = nn.ModuleList(block(2 * fine, fine) for _, fine in steps)
        self.head = nn.Conv2d(self.WIDTHS[0], CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        *skipped, x = self.encode(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skipped)):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)


class FCN(Segmenter):
    def __init__(self, layer: type[nn.ConvTranspose2d]) -> None:
        super().__init__()
        self.score = nn.ModuleList(nn.Conv2d(width, CLASSES, 1) for width in self.WIDTHS[:0:-1])
        self.up = nn.ModuleList(layer(CLASSES, CLASSES, 4, stride=2, padding=1) for _ in self.score)

    def forward(self, x: Tensor) -> Tensor:
        _, *levels = self.encode(x)  # nothing is added at full size
        scores: Tensor | float = 0.0
        for score, up, level in zip(self.score, self.up, reversed(levels)):
            scores = up(score(level) + scores)
        return scores


NETWORKS = {"unet": UNet, "fcn": FCN}


def build(network: str, operator: str, init: str) -> nn.Module:
    model = NETWORKS[network](common.OPERATORS[operator])
    if init == "bilinear":
        for up in model.up:
            deconv_ext.init.bilinear_(up)
    return model


# --- quality -------------------------------------------------------------------------------------


def iou(prediction: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of each class, [CLASSES], over all pixels of all scenes."""
    pairs = torch.bincount((truth * CLASSES + prediction).flatten(), minlength=CLASSES**2)
    confusion = pairs.view(CLASSES, CLASSES).double()
    intersection = confusion.diag()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


@torch.inference_mode()
def predict(model: nn.Module, scenes: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model(part).argmax(1) for part in scenes.split(BATCH)])


def draw(scenes: Tensor, predictions: dict[str, Tensor], truth: Tensor, path: Path) -> None:
    rows = []
    for i in range(4):
        rows.append([("input", scenes[i])])
        for title, classes in [*predictions.items(), ("truth", truth)]:
            rows[-1].append((title, COLOURS[classes[i]].movedim(-1, 0)))
    names = ["background", *map(str, range(10))]
    common.picture_grid(rows, path, 2.6, dict(zip(names, COLOURS.tolist())))


def main(argv: Sequence[str] | None = None) -> int:
    """Train and measure; 0 if held-out scenes are segmented and both operators agree."""
    parser = common.parser(__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="unet")
    parser.add_argument(
        "--init", choices=["default", "bilinear"], default="default", help="of the heads of fcn"
    )
    options = common.parse(parser, argv, steps=600, quick_steps=120)
    if options.init == "bilinear" and options.network != "fcn":
        parser.error("--init bilinear is for the heads of --network fcn: scores of the classes")
    device = options.device

    train, held_out = glyphs()
    count = 32 if options.quick else 128
    scenes, truth = compose(held_out, count, torch.Generator().manual_seed(options.seed + 1))
    scenes, truth = scenes.to(device), truth.to(device)
    weight = torch.ones(CLASSES, device=device)
    weight[0] = BACKGROUND_WEIGHT
    criterion = nn.CrossEntropyLoss(weight)

    runs = []
    for operator in options.operators:
        torch.manual_seed(options.seed)
        model = build(options.network, operator, options.init).to(device)
        step = common.supervised(model, criterion, LEARNING_RATE, options.steps)
        runs.append(common.Run(options.network, operator, model, step))
    nothing = float(iou(torch.zeros_like(truth), truth).mean())
    common.train(
        runs,
        batches(train, BATCH // 2 if options.quick else BATCH, options.seed, device),
        options.steps,
    )

    predictions = [predict(run.model, scenes) for run in runs]
    quality = [iou(prediction, truth) for prediction in predictions]
    columns = {"mean IoU": [f"{q.mean():.3f}" for q in quality]}
    print(f"\n{count} held-out scenes; mean IoU of a prediction of background alone {nothing:.3f}")
    print(common.table(runs, columns))
    by_class = "  ".join(f"{d}: {q:.2f}" for d, q in enumerate(quality[0][1:]))
    print(f"IoU of background: {quality[0][0]:.2f}, of digits  {by_class}")
    agreed = common.agree(runs)
    titles = {f"{options.network}, {run.operator}": p.cpu() for run, p in zip(runs, predictions)}
    draw(scenes.cpu(), titles, truth.cpu(), options.output / "segmentation.png")
    common.draw_curves(runs, options.output / "segmentation_curves.png", "cross-entropy")

    better = all(float(q.mean()) > 1.2 * nothing for q in quality)
    if not better:
        print("FAILED: hardly better than a prediction of background alone", file=sys.stderr)
    return 0 if better and agreed else 1


if __name__ == "__main__":
    sys.exit(main())
