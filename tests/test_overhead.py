"""What a call costs beside the arithmetic, on a layer that has next to none."""

import time

import pytest
import torch

import deconv_ext
from deconv_ext.functional import conv_transpose2d

#: At most this share of torch's time (0.22 to 0.32 seen), and of a whole step (0.42; most of it is
#: the engine's own).
SHARE, SHARE_OF_STEP = 0.45, 0.55


def layer_of(cls):
    return cls(8, 8, 4, stride=2, padding=1)


def forward(function, *args):
    return function(*args)


def forward_and_backward(function, *args):
    function(*args).sum().backward()


def best_times(functions, repeats=41, calls=50):
    """Processor seconds per call in the least disturbed turn of each; turns alternate.

    Everything happens in this thread, so its own clock leaves out what else the machine does.
    """
    times = [[] for _ in functions]
    for _ in range(repeats):
        for function, samples in zip(functions, times):
            start = time.thread_time()
            for _ in range(calls):
                function()
            samples.append((time.thread_time() - start) / calls)
    return [min(samples) for samples in times]


@pytest.mark.parametrize("mode", ["no_grad", "grad", "module no_grad", "forward and backward"])
def test_overhead(mode, capsys):
    torch.set_num_threads(1)
    x, w, b = torch.randn(1, 8, 4, 4), torch.randn(8, 8, 4, 4), torch.randn(8)
    w.requires_grad_(), b.requires_grad_()
    if mode == "module no_grad":
        torchs, ours = (layer_of(m.ConvTranspose2d) for m in (torch.nn, deconv_ext))
        calls = [lambda: torchs(x), lambda: ours(x)]
    else:
        step = forward_and_backward if mode == "forward and backward" else forward
        calls = [
            lambda f=f: step(f, x, w, b, 2, 1)
            for f in (torch.nn.functional.conv_transpose2d, conv_transpose2d)
        ]
    with torch.set_grad_enabled("no_grad" not in mode):
        theirs, ours = best_times(calls)
    with capsys.disabled():
        print(f"\n  {mode}: {ours * 1e6:.1f} us a call, torch {theirs * 1e6:.1f} us ", end="")
    assert ours < (SHARE_OF_STEP if "backward" in mode else SHARE) * theirs
