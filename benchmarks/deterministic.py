"""What torch.use_deterministic_algorithms(True) costs: python benchmarks/deterministic.py [device]

Forward and backward of a few layers, ours and torch's, with the mode off and on, in turns. The mode
by itself also fills every new tensor before it is written, to make the use of unwritten memory
show (`torch.utils.deterministic.fill_uninitialized_memory`); the third column is without that.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.benchmark import Timer

import deconv_ext

LAYERS = (((64, 32, 4, 2, 1), 32), ((64, 32, 2, 2), 32), ((64, 64, 4, 2, 1, 0, 64), 32))
#: (deterministic, filled)
MODES = ((False, False), (True, True), (True, False))
ROUNDS = 15


@contextmanager
def mode(deterministic: bool, filled: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


def microseconds(step: Callable[[], None]) -> float:
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median * 1e6


def main(device: str = "cpu") -> None:
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads; microseconds")
    print(f"{'layer':<34}{'':<12}{'off':>9}{'on':>9}{'on, unfilled':>14}")
    for args, size in LAYERS:
        for cls, name in (
            (deconv_ext.ConvTranspose2d, "deconv_ext"),
            (torch.nn.ConvTranspose2d, "torch"),
        ):
            layer = cls(*args, device=device)
            x = torch.randn(4, args[0], size, size, device=device, requires_grad=True)
            dy = torch.randn_like(layer(x))

            def step(layer=layer, x=x, dy=dy):
                torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

            best = [float("inf")] * len(MODES)
            for _ in range(ROUNDS):
                for i, setting in enumerate(MODES):
                    with mode(*setting):
                        best[i] = min(best[i], microseconds(step))
            print(
                f"{args!s:<34}{name:<12}{best[0]:>9.0f}{best[1]:>9.0f}{best[2]:>14.0f}", flush=True
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
