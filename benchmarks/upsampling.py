"""Transposed convolution against its rivals, in the same networks on the same data.

The transposed convolutions of two networks are replaced by other ways to enlarge features, and each
network is trained on the same batches from the same seeds:

* super-resolution x3 by the network of `examples/super_resolution.py`: a stage, 9x9 with stride 3;
* segmentation by the U-Net of `examples/segmentation.py`: three stages, 2x2 with stride 2.

The rivals of a transposed convolution with C_in, C_out channels, kernel k and stride s:

* transposed convolution, deconv_ext, and the same by torch's operator;
* sub-pixel convolution: k/s x k/s convolution to C_out * s^2 channels, pixels shuffled. It can
  compute just what the transposed convolution can, with as many parameters;
* bilinear, nearest + conv: interpolation, then a 3x3 convolution from C_in to C_out channels;
* max-unpooling + conv: 1x1 convolution to C_out channels, values put where the encoder's pooling
  found its maxima, 3x3 convolution. There must be an encoder that pools: segmentation alone.

Quality, on held-out data, is of the whole network: PSNR in dB, and mean IoU. So is the checkerboard
on even inputs (the root mean square over phases, in 1/255 of the range of the output). Parameters,
multiply-adds, times and memory are of the stages alone, on one training batch. Times on a CPU are
processor time of one thread, which other programs disturb little; on CUDA between two events.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import gc
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from upsampling_report import MEASURES, OURS, TORCHS, Row, draw, table, verdicts

from deconv_ext import bench_table, init, phases
from deconv_ext.bench_machine import environment
from deconv_ext.bench_timing import EventTimer, Function

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import common  # noqa: E402
import reconstruction  # noqa: E402
import segmentation  # noqa: E402

UNPOOLING = "max-unpooling + conv"
SCALE = 3  # of super-resolution
SCENES = 8  # of segmentation, in a batch


# --- the rivals ----------------------------------------------------------------------------------


def convolution(layer: nn.ConvTranspose2d, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution that starts as strong as the layer which it replaces, with its bias."""
    result = nn.Conv2d(layer.in_channels, out_channels, kernel, padding=kernel // 2)
    strength = layer.weight.detach().square().mean().sqrt() * math.sqrt(init.fans(layer)[0])
    nn.init.normal_(result.weight, std=float(strength) / math.sqrt(layer.in_channels * kernel**2))
    nn.init.zeros_(result.bias)
    return result


def interpolation(mode: str) -> Callable[[nn.ConvTranspose2d], nn.Module]:
    """A function that replaces a layer: interpolation in this mode, then a 3x3 convolution."""

    def replace(layer: nn.ConvTranspose2d) -> nn.Module:
        return nn.Sequential(
            nn.Upsample(scale_factor=layer.stride[0], mode=mode),
            convolution(layer, layer.out_channels, 3),
        )

    return replace


def sub_pixel(layer: nn.ConvTranspose2d) -> nn.Module:
    """k/s x k/s convolution to C_out * s^2 channels, pixels shuffled."""
    stride = layer.stride[0]
    kernel = layer.kernel_size[0] // stride
    return nn.Sequential(
        convolution(layer, layer.out_channels * stride**2, kernel), nn.PixelShuffle(stride)
    )


class Unpooling(nn.Module):
    """1x1 convolution, values put where a pooling of the encoder found its maxima, 3x3."""

    places: Tensor  # what `UnpoolingUNet` found for this batch

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        super().__init__()
        self.stride, channels = layer.stride[0], layer.out_channels
        self.reduce = convolution(layer, channels, 1)
        self.spread = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(F.max_unpool2d(self.reduce(x), self.places, self.stride))


class UnpoolingUNet(segmentation.UNet):
    """Gives the places of the maxima to the stages, the finest one to the last stage."""

    def encode(self, x: Tensor) -> list[Tensor]:
        levels: list[Tensor] = []
        for stage in self.encoder:
            if levels:
                x, self.up[-len(levels)].places = F.max_pool2d(x, 2, return_indices=True)
            x = stage(x)
            levels.append(x)
        return levels


#: What each makes of a transposed convolution of ours.
RIVALS: dict[str, Callable[[nn.ConvTranspose2d], nn.Module]] = {
    OURS: copy.deepcopy,
    TORCHS: lambda layer: layer,  # the network was built with torch's
    "sub-pixel": sub_pixel,
    "bilinear + conv": interpolation("bilinear"),
    "nearest + conv": interpolation("nearest"),
    UNPOOLING: Unpooling,
}


# --- the tasks -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """A network with transposed convolutions, and what it is trained and judged by."""

    name: str
    measure: str  # of quality; more is better
    build: Callable[[str, str], nn.Module]  # of an operator, for a rival
    batches: Callable[[int], Iterator[Any]]  # of a seed
    criterion: Callable[[Tensor, Tensor], Tensor]
    rate: float  # of learning, at most
    quality: Callable[[nn.Module], float]
    output: Callable[[Tensor], Tensor]  # the network's, brought to 0..1
    period: int  # of a checkerboard
    rivals: tuple[str, ...]
    steps: tuple[int, int]  # of training, in full and quick


def super_resolution(device: torch.device) -> Task:
    """One stage, 9x9 with stride 3; PSNR of held-out photographs."""
    task = reconstruction.super_resolution_task(SCALE)
    return Task(
        f"super-resolution x{SCALE}",
        "PSNR (dB)",
        lambda operator, rival: task.network(common.OPERATORS[operator]),
        lambda seed: reconstruction.batches(task, seed, device),
        F.mse_loss,
        task.rate,
        lambda model: reconstruction.evaluate(model, task, device).psnr,
        lambda output: output,
        SCALE,
        tuple(name for name in RIVALS if name != UNPOOLING),
        (200, 15),
    )


def segmentation_task(device: torch.device, scenes: int) -> Task:
    """Three stages, 2x2 with stride 2; mean IoU of `scenes` images with held-out digits."""
    train, held_out = segmentation.glyphs()
    images, truth = (
        tensor.to(device)
        for tensor in segmentation.compose(held_out, scenes, torch.Generator().manual_seed(1))
    )
    weight = torch.ones(segmentation.CLASSES, device=device)
    weight[0] = segmentation.BACKGROUND_WEIGHT

    def build(operator: str, rival: str) -> nn.Module:
        network = UnpoolingUNet if rival == UNPOOLING else segmentation.UNet
        return network(common.OPERATORS[operator])

    def quality(model: nn.Module) -> float:
        return float(segmentation.iou(segmentation.predict(model, images), truth).mean())

    return Task(
        "segmentation",
        "mean IoU",
        build,
        lambda seed: segmentation.batches(train, SCENES, seed, device),
        nn.CrossEntropyLoss(weight),
        segmentation.LEARNING_RATE,
        quality,
        lambda scores: scores.softmax(1),
        8,
        tuple(RIVALS),
        (150, 5),
    )


def network(task: Task, rival: str, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    """The network with its stages replaced, and the stages; the rest starts the same for all."""
    torch.manual_seed(seed)
    model = task.build("torch" if rival == TORCHS else "deconv_ext", rival)
    stages = {name: RIVALS[rival](layer) for name, layer in phases.layers(model)}
    for name, stage in stages.items():
        model.set_submodule(name, stage)
    return model, list(stages.values())


# --- the costs of the stages ---------------------------------------------------------------------


def stage_inputs(model: nn.Module, stages: Sequence[nn.Module], batch: Tensor) -> list[Tensor]:
    """What each stage gets when the network sees the batch."""
    found: list[Tensor] = []
    handles = [
        stage.register_forward_pre_hook(lambda module, args: found.append(args[0].detach()))
        for stage in stages
    ]
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    return found


def multiply_adds(stages: Sequence[nn.Module], inputs: Sequence[Tensor]) -> int:
    """Of one forward pass; 4 for a value that bilinear interpolation makes, 0 for other moves."""
    total = 0

    def count(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.ConvTranspose2d):  # every value is weighted once for each tap
            total += args[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Upsample) and module.mode == "bilinear":
            total += 4 * output.numel()

    parts = [part for stage in stages for part in stage.modules()]
    handles = [part.register_forward_hook(count) for part in parts]
    with torch.no_grad():
        for stage, x in zip(stages, inputs, strict=True):
            stage(x)
    for handle in handles:
        handle.remove()
    return total


def passes(stages: Sequence[nn.Module], inputs: Sequence[Tensor]) -> tuple[Function, Function]:
    """(forward, backward) of all stages, with the gradients of inputs and parameters."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    parameters = [parameter for stage in stages for parameter in stage.parameters()]

    def forward() -> list[Tensor]:
        return [stage(x) for stage, x in zip(stages, leaves, strict=True)]

    outputs = forward()
    weights = [torch.randn_like(y) for y in outputs]

    def backward() -> object:
        return torch.autograd.grad(outputs, [*leaves, *parameters], weights, retain_graph=True)

    return forward, backward


def microseconds(
    functions: dict[str, Function], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median time of a call of each, measured in turns."""
    if device.type == "cuda":
        timings = EventTimer(device, samples=rounds).compare(lambda copy: functions)
        return {name: timing.us for name, timing in timings.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 2):  # the first two warm up
        for name, function in functions.items():
            start = time.process_time()
            function()
            taken[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    return {name: 1e6 * statistics.median(seconds[2:]) for name, seconds in taken.items()}


def peak_memory(function: Function, device: torch.device) -> int | None:
    """The most bytes that a call holds at once, beyond those held before; None where unknown.

    On a CPU, of the whole process, as Linux counts it: scratch of any library is in it.
    """
    function()  # what stays for good, such as compiled kernels, is not of the call
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    found = []
    for _ in range(3):  # the least disturbed one counts
        ctypes.CDLL(None).malloc_trim(0)  # so that memory freed before does not hide what is taken
        reset.write_text("5")  # proc(5): the peak starts anew
        before = _resident("VmRSS")
        function()
        found.append(_resident("VmHWM") - before)
    return min(found)


def _resident(name: str) -> int:
    """Bytes that the process holds in memory (VmRSS), or held at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)[1])


# --- the measurements ----------------------------------------------------------------------------


def train(task: Task, seeds: int, steps: int, device: torch.device) -> dict[str, Any]:
    """(quality, ripple) of every rival, a value for each seed; rivals learn in turns."""
    found: dict[str, Any] = {rival: ([], []) for rival in task.rivals}
    for seed in range(seeds):
        runs = []
        for rival in task.rivals:
            model = network(task, rival, seed)[0].to(device)
            step = common.supervised(model, task.criterion, task.rate, steps)
            runs.append(common.Run(rival, "", model, step))
        print(f"{task.name}, seed {seed}", flush=True)
        common.train(runs, task.batches(seed), steps)
        for run in runs:
            run.model.eval()
            quality, ripple = found[run.name]
            quality.append(task.quality(run.model))
            pattern = reconstruction.even_ripple(run.model, task.period, device, task.output)
            ripple.append(float(pattern.square().mean().sqrt()))
    return found


def costs(task: Task, device: torch.device, rounds: int) -> dict[str, dict[str, Any]]:
    """Parameters, multiply-adds, times and memory of the stages of every rival."""
    batch = next(task.batches(0))[0]
    functions: dict[str, tuple[Function, Function]] = {}
    found: dict[str, dict[str, Any]] = {}
    for rival in task.rivals:
        model, stages = network(task, rival, 0)
        model.to(device).eval()
        inputs = stage_inputs(model, stages, batch)
        forward, backward = functions[rival] = passes(stages, inputs)

        def step(stages: Any = stages, inputs: Any = inputs) -> object:
            return passes(stages, inputs)[1]()

        found[rival] = {
            "parameters": sum(p.numel() for stage in stages for p in stage.parameters()),
            "multiply_adds": multiply_adds(stages, inputs),
            "peak_bytes": peak_memory(step, device),
        }
    for index, name in enumerate(("forward_us", "backward_us")):
        chosen = {rival: both[index] for rival, both in functions.items()}
        for rival, us in microseconds(chosen, device, rounds).items():
            found[rival][name] = us
    return found


def compare(options: argparse.Namespace) -> tuple[dict[str, Any], list[Row]]:
    """Measure everything; the result is in `<output>/upsampling.json` too, task by task."""
    device, quick = options.device, options.quick
    seeds = options.seeds or (1 if quick else 2)
    load = os.getloadavg()[0]  # processes that ran or waited
    facts = environment(device, seeds=seeds, load=load)
    rows = []
    for task in (super_resolution(device), segmentation_task(device, 16 if quick else 128)):
        steps = options.steps or task.steps[quick]
        measured = costs(task, device, 3 if quick else 15)
        for rival, (quality, ripple) in train(task, seeds, steps, device).items():
            row = Row(task.name, task.measure, rival, steps, quality, ripple, **measured[rival])
            rows.append(row)
        content = {"facts": facts, "rows": [dataclasses.asdict(row) for row in rows]}
        bench_table.dump(options.output / "upsampling.json", content)
    return facts, rows


def main(argv: Sequence[str] | None = None) -> int:
    """Train, measure, show; 0 if every figure is finite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller training, seconds long")
    parser.add_argument("--steps", type=int, help="training steps, in place of each task's own")
    parser.add_argument("--seeds", type=int, help="trainings of each, default 2 (quick: 1)")
    parser.add_argument("--device", type=torch.device, default="cpu")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--load", type=Path, metavar="JSON", help="show an old result instead")
    options = parser.parse_args(argv)
    if options.load:
        found = json.loads(options.load.read_text())
        facts, rows = found["facts"], [Row(**row) for row in found["rows"]]
    else:
        facts, rows = compare(options)
    print(
        f"\n{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"{facts['seeds']} seeds, load {facts['load']:.1f} at the start"
    )
    print(table(rows), *verdicts(rows), sep="\n")
    draw(rows, options.output / "upsampling.png")
    values = [measure.mean(row) for row in rows for measure in MEASURES]
    return 0 if all(value is None or math.isfinite(value) for value in values) else 1


if __name__ == "__main__":
    sys.exit(main())
