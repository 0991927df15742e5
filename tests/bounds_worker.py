"""Run by test_bounds.py under the guarded heap: `python bounds_worker.py HEAP EDGE ISA`.

Every operand, result and scratch block then lies at the edge of memory that must not be touched.
"""

import ctypes
import faulthandler
import sys

import torch
from torch import Tensor

from deconv_ext.testing import EDGE, TINY, Operands, random_case
from support import OPERATIONS, C, assert_equal, cast, dtype_name, exact, run_if_accepted, use_isa

HEAP = ctypes.CDLL(sys.argv[1])
HEAP.guarded_block.restype = ctypes.c_void_p
HEAP.guarded_block.argtypes = ctypes.c_size_t, ctypes.c_size_t
HEAP.free.argtypes = (ctypes.c_void_p,)
MODE = {"end": 1, "begin": 2}[sys.argv[2]]
blocks: list[int] = []  # of the operands in use


def guarded(tensor: Tensor) -> Tensor:
    """A copy, strides included, in a block of its own that ends or begins at a guard page."""
    if not tensor.numel():
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    HEAP.guard(MODE)
    blocks.append(HEAP.guarded_block(span * tensor.itemsize, tensor.itemsize))
    HEAP.guard(0)
    memory = (ctypes.c_char * (span * tensor.itemsize)).from_address(blocks[-1])
    flat = torch.frombuffer(memory, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def kernels(dtype: torch.dtype, every: int) -> None:
    """Every algorithm on one of `every` cases: right, and without touching what is not its own."""
    layouts = ("contiguous", "channels_last", "sliced", "transposed")
    cases = sorted((*TINY, *EDGE, *map(random_case, range(30))), key=lambda case: case.macs)
    for index, case in list(enumerate(cases))[::every]:  # small first: scratch grows with them
        operands, results = exact(case, dtype.is_complex)
        depthwise = 1 < case.groups == case.c_in == case.c_out
        layout = "channels_last" if depthwise else layouts[(index + MODE) % 4]
        t = Operands(*map(guarded, cast(operands, dtype, layout)))
        for op in OPERATIONS:
            for algo in C.list_algorithms(op):
                if algo == "depthwise" and not depthwise:
                    continue
                what = f"{algo} {dtype_name(dtype)} {op} {layout} {case!r}"
                print(what, flush=True)
                HEAP.guard(MODE)
                got = run_if_accepted(op, case, t, algo)
                HEAP.guard(0)
                if got is not None:
                    assert_equal(got, results[op].to(dtype), what)
        HEAP.guard(MODE)
        got = C.grad_bias(t.dy)
        HEAP.guard(0)
        assert_equal(got, operands.dy.sum((0, 2, 3)).to(dtype), ("grad_bias", layout, case))
        while blocks:
            HEAP.free(blocks.pop())


def planted(mistake: str) -> None:
    """What the guarded heap is for: it must end the process."""
    tensor = guarded(torch.zeros(7, 3))
    step = {"end": tensor.nbytes, "begin": -1}[sys.argv[2]]
    address = tensor.data_ptr() + step
    if mistake == "read":
        ctypes.string_at(address, 1)
    if mistake == "write":
        HEAP.guard(MODE)
        block = torch.empty(5)  # aligned, so that some bytes behind it can be written
        HEAP.guard(0)
        ctypes.memset(block.data_ptr() + 20, 0, 1)
        del block
    if mistake == "uninitialised":
        HEAP.guard(MODE)
        fresh = torch.empty(100)
        HEAP.guard(0)
        assert not fresh.isnan().all(), "fresh memory is NaN"


if __name__ == "__main__":
    faulthandler.enable()
    if sys.argv[3] == "planted":
        planted(sys.argv[4])
    else:
        with use_isa(sys.argv[3]):
            kernels(torch.float32, every=1)
            for each in (torch.float64, torch.bfloat16, torch.complex64):  # same code, other types
                kernels(each, every=3)
        print("touched nothing else")
