"""Find the text on photographs with a pretrained detector, with torch's layers and with ours.

The model is the PP-OCRv4 text detector that the package rapidocr-onnxruntime carries; onnx2torch
turns it into a torch.nn.Module, whose head ends in two transposed convolutions. Both versions of
the network look at the same photographs (they come with scikit-image; nothing is downloaded), and
must find the same boxes. The picture with the boxes is written to `<output>/text_detection.png`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from scipy.spatial import ConvexHull
from skimage import data, measure, transform, util

import deconv_ext

DETECTOR = "models/ch_PP-OCRv4_det_infer.onnx"
SHORT_SIDE = 736  # pixels; what the detector was trained for
THRESHOLD, MIN_SCORE, UNCLIP = 0.3, 0.5, 1.6  # of the detector's own postprocessing (DBNet)
TOLERANCE = 1e-4  # of a probability; float32 rounding differs by about 1e-6


def photographs() -> dict[str, np.ndarray]:
    """The test images as float arrays [H, W, 3] in 0..1; all are part of scikit-image's wheel."""
    motorcycle = data.stereo_motorcycle()[0][100:400, 200:700]  # the part with lettering
    images = {"page": data.page(), "text": data.text(), "motorcycle": motorcycle}
    return {
        name: util.img_as_float32(image if image.ndim == 3 else np.stack([image] * 3, axis=-1))
        for name, image in images.items()
    }


def to_torch(model: onnx.ModelProto) -> torch.nn.Module:
    """onnx2torch.convert, also where torchvision does not load.

    onnx2torch imports torchvision for two operators that the detector does not have, but the
    usual build of torchvision fails beside a CPU-only torch.
    """
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = types.ModuleType("torchvision")
        sys.modules["torchvision.ops"] = ops = types.ModuleType("torchvision.ops")
        ops.roi_align = None  # type: ignore[attr-defined]
    import onnx2torch

    return onnx2torch.convert(model)


def load_detector() -> torch.nn.Module:
    """The detector as a torch.nn.Module: [N, 3, H, W] to text probability [N, 1, H, W]."""
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError(
            "the package with the pretrained detector is missing: pip install rapidocr-onnxruntime"
        )
    model = onnx.load(Path(package.submodule_search_locations[0]) / DETECTOR)
    graph = model.graph
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = node.attribute[0].t  # onnx2torch wants weights to be initializers
        tensor.name = node.output[0]
        graph.initializer.append(tensor)
        graph.node.remove(node)
    return to_torch(model).eval()


def to_input(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] in 0..1 to the network's [1, 3, H', W'] in -1..1, sides multiples of 32."""
    height, width = image.shape[:2]
    scale = max(1.0, SHORT_SIDE / min(height, width))
    shape = tuple(round(side * scale / 32) * 32 for side in (height, width))
    resized = transform.resize(image, shape)[..., ::-1]  # the network was trained on BGR
    return torch.from_numpy((resized.transpose(2, 0, 1)[None] - 0.5) / 0.5).float()


def enclosing_rectangle(points: np.ndarray, grow: float) -> np.ndarray:
    """Corners [4, 2] of the smallest rotated rectangle around points [P, 2].

    Its sides are moved outwards by grow * area / perimeter: the detector was taught to mark
    shrunken text regions.
    """
    hull = points[ConvexHull(points, qhull_options="QJ").vertices]  # QJ: a line is fine too
    rectangles = []
    for edge in np.roll(hull, -1, axis=0) - hull:  # one side lies on an edge of the hull
        axis = edge / np.linalg.norm(edge)
        frame = np.array([axis, [-axis[1], axis[0]]])
        low, high = (hull @ frame.T).min(axis=0), (hull @ frame.T).max(axis=0)
        rectangles.append((np.prod(high - low), frame, low, high))
    area, frame, low, high = min(rectangles, key=lambda rectangle: rectangle[0])
    margin = grow * area / (2 * (high - low).sum())
    (left, top), (right, bottom) = low - margin, high + margin
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]]) @ frame


def find_boxes(probability: np.ndarray, size: tuple[int, int]) -> list[np.ndarray]:
    """Text boxes, each [4, 2] as (x, y) in an image of size (H, W), from a probability map."""
    boxes = []
    scale = np.array(size) / probability.shape
    for region in measure.regionprops(measure.label(probability > THRESHOLD), probability):
        if region.intensity_mean < MIN_SCORE or min(np.ptp(region.coords, axis=0)) < 3:
            continue
        corners = enclosing_rectangle(region.coords + 0.5, UNCLIP) * scale
        boxes.append(corners[:, ::-1])
    return boxes


class Stopwatch:
    """Adds up the seconds that a model spends in its transposed convolutions."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.ConvTranspose2d):
                module.register_forward_pre_hook(self._start)
                module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self.seconds -= time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter()

    def lap(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def draw(images: dict[str, np.ndarray], boxes: dict[str, list[np.ndarray]], path: Path) -> None:
    figure = Figure(figsize=(10, 13), layout="constrained")
    heights = [image.shape[0] / image.shape[1] for image in images.values()]
    for axes, (name, image) in zip(
        figure.subplots(len(images), height_ratios=heights), images.items(), strict=True
    ):
        axes.imshow(image)
        axes.set_title(f"{name}: {len(boxes[name])} boxes")
        axes.set_axis_off()
        for corners in boxes[name]:
            axes.add_patch(Polygon(corners, fill=False, edgecolor="lime", linewidth=1.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; 0 if both versions of the network found the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--repeats", type=int, default=5, help="timed runs per photograph")
    options = parser.parse_args(argv)

    torch_model = load_detector()
    our_model = copy.deepcopy(torch_model)
    images = photographs()
    print(deconv_ext.convert(our_model, sample=to_input(images["page"])))
    models = (torch_model, our_model)
    watches = [Stopwatch(model) for model in models]

    boxes: dict[str, list[np.ndarray]] = {}
    agree = True
    print(
        f"\n{'photograph':<12}{'input':>14}{'boxes torch':>13}{'ours':>6}{'largest diff.':>15}"
        f"{'ms torch':>10}{'ours':>7}   (transposed convolutions only)"
    )
    for name, image in images.items():
        x = to_input(image)
        maps = [model(x)[0, 0].numpy() for model in models]  # also warms up
        for watch in watches:
            watch.lap()
        milliseconds: list[list[float]] = [[], []]
        for _ in range(options.repeats):  # alternating, so that a slow moment hits both
            for model, watch, times in zip(models, watches, milliseconds, strict=True):
                model(x)
                times.append(1e3 * watch.lap())
        found = [find_boxes(probability, image.shape[:2]) for probability in maps]
        boxes[name] = found[1]
        difference = float(np.abs(maps[0] - maps[1]).max())
        agree &= len(found[0]) == len(found[1]) > 0 and difference <= TOLERANCE
        print(
            f"{name:<12}{'x'.join(map(str, x.shape)):>14}{len(found[0]):>13}{len(found[1]):>6}"
            f"{difference:>15.1e}{statistics.median(milliseconds[0]):>10.1f}"
            f"{statistics.median(milliseconds[1]):>7.1f}"
        )
    path = options.output / "text_detection.png"
    draw(images, boxes, path)
    print(f"wrote {path}")
    if not agree:
        print("FAILED: the converted network does not find the same boxes", file=sys.stderr)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
