"""Threads and forks: many callers at once, loader workers, and the number of threads asked for."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import deconv_ext
from deconv_ext.functional import conv_transpose2d


def test_eight_threads_at_once():
    """Each has its own image and weights; all start together, forward and backward, many times."""
    torch.set_num_threads(2)
    layers = [deconv_ext.ConvTranspose2d(4 + i, 8, 4, 2, 1) for i in range(8)]
    images = [torch.randn(2, 4 + i, 9, 11 + i) for i in range(8)]

    def step(i):
        x = images[i].clone().requires_grad_()
        y = layers[i](x)
        return y, *torch.autograd.grad(y.sin().sum(), (x, *layers[i].parameters()))

    want, barrier = [step(i) for i in range(8)], threading.Barrier(8)

    def work(i):
        barrier.wait()
        return all(
            all(torch.equal(a, b) for a, b in zip(step(i), want[i], strict=True)) for _ in range(20)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


FIRST_CALLS = """
import threading, torch, deconv_ext
layer, x = deconv_ext.ConvTranspose2d(4, 6, 3), torch.randn(1, 4, 5, 5)
barrier, results = threading.Barrier(8), []
def call(i):
    barrier.wait()
    if i % 2:
        results.append(layer(x))
    else:
        import deconv_ext.ops
        geometry = ((1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1)
        operator = torch.ops.deconv_ext.conv_transpose2d
        results.append(operator(x, layer.weight, layer.bias, *geometry))
threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
[t.start() for t in threads], [t.join() for t in threads]
assert len(results) == 8 and all(torch.equal(y, results[0]) for y in results), results
"""


def test_eight_first_calls_at_once():
    """The binary module is loaded, and the operators registered, exactly once."""
    done = subprocess.run([sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Upsampled(Dataset):
    """Samples that a layer of ours makes inside of the loader's worker."""

    def __init__(self, layer):
        self.layer = layer

    def __len__(self):
        return 6

    def __getitem__(self, index):
        x = torch.full((1, 8, 24, 24), float(index))
        with torch.no_grad():
            return self.layer(x)[0]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_loader_workers_after_use_in_the_parent(context):
    """The parent has run its team of threads before; torch gives a worker one thread."""
    torch.set_num_threads(2)
    dataset = Upsampled(deconv_ext.ConvTranspose2d(8, 8, 4, 2, 1))
    want = torch.stack([dataset[i] for i in range(len(dataset))])
    loader = DataLoader(
        dataset, batch_size=2, num_workers=2, multiprocessing_context=context, timeout=120
    )
    assert torch.equal(torch.cat(list(loader)), want)


COUNTS = """
import torch, deconv_ext
layer, x = deconv_ext.ConvTranspose2d(16, 16, 4, 2, 1), torch.randn(4, 16, 32, 32)
def threads():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))
with torch.no_grad():
    deconv_ext.build_info()
    before = threads()
    for count in (1, 3, 4):
        torch.set_num_threads(count)
        layer(x)
        print(threads() - before)
"""


def test_set_num_threads_is_honoured():
    """A call starts as many threads as torch is told, less the one that calls; they stay."""
    done = subprocess.run([sys.executable, "-c", COUNTS], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "2", "3"], done


def test_number_of_threads_changes_nothing_in_the_result():
    x, w, results = torch.randn(2, 8, 17, 19), torch.randn(8, 8, 4, 4), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(conv_transpose2d(x, w, stride=2))
    assert all(torch.equal(y, results[0]) for y in results)
