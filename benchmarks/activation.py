"""What an activation in the store saves: python benchmarks/activation.py [device] [dtype]

Forward without gradients, and a training step, of a few layers with an activation: fused, as our
operator and torch's activation, and as torch does both. In turns; medians of the rounds, in
microseconds, and how many times as fast as the two pairs of operators the fused one is.
"""

import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from deconv_ext.activation import FUNCTIONS
from deconv_ext.functional import conv_transpose2d
from deconv_ext.testing import LAYERS, Case

#: Bound by memory, by multiply-adds, and few or single channels.
NAMES = ("unet_128_64", "linknet_64_64", "cyclegan_256_128", "dbnet_64_1", "dla_dw_64")
ROUNDS = 7


def contenders(case: Case, name: str, train: bool, device: str, dtype: torch.dtype) -> list:
    t = case.operands(0)
    x, w, bias, dy = (v.to(device, dtype) for v in t)
    leaves = [v.requires_grad_(train) for v in (x, w, bias)]
    arguments = case.torch_arguments

    def fused():
        return conv_transpose2d(*leaves, **arguments, activation=name)

    def ours():
        return FUNCTIONS[name](conv_transpose2d(*leaves, **arguments), 0.01)

    def torchs():
        return FUNCTIONS[name](F.conv_transpose2d(*leaves, **arguments), 0.01)

    if not train:
        return [fused, ours, torchs]
    return [lambda f=f: torch.autograd.grad(f(), leaves, dy) for f in (fused, ours, torchs)]


def microseconds(step: Callable[[], object]) -> float:
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median * 1e6


def main(device: str = "cpu", dtype: str = "float32") -> None:
    print(f"torch {torch.__version__}, {device}, {dtype}, {torch.get_num_threads()} threads")
    heads = f"{'fused':>9}{'ours + act':>18}{'torch + act':>18}"
    print(f"{'layer':<20}{'activation':<12}{'':<9}{heads}")
    for case in LAYERS:
        if case.name not in NAMES:
            continue
        for name in FUNCTIONS:
            for train in (False, True):
                steps = contenders(case, name, train, device, getattr(torch, dtype))
                times: list[list[float]] = [[] for _ in steps]
                with torch.set_grad_enabled(train):
                    for _ in range(ROUNDS):
                        for samples, step in zip(times, steps):
                            samples.append(microseconds(step))
                fused, *others = map(statistics.median, times)
                compared = "".join(f"{t:>9.0f} ({t / fused:4.2f}x)" for t in others)
                kind = "step" if train else "forward"
                print(f"{case.name:<20}{name:<12}{kind:<9}{fused:>9.0f}{compared}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
