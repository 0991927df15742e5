"""What the tests of the binary module share: the operations, their definitions and torch's."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from deconv_ext.build import extension
from deconv_ext.testing import Case, Operands, relayout

C = extension()
OPERATIONS = ("forward", "grad_input", "grad_weight")
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DTYPES = (*FLOATS, torch.complex64, torch.complex128, torch.int64)


def in_memory(tensor: Tensor) -> tuple[object, ...]:
    """What a fake tensor must have in common with the real one."""
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.device


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kernel_calls(function: Callable[[], object]) -> list[str]:
    """The operations that the kernels were asked for while the function ran, in order."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        function()
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    prefix = "deconv_ext::conv_transpose2d"
    names = [event.name for event in events if event.name.startswith(prefix)]
    return [name.removeprefix(prefix).removeprefix("_") or "forward" for name in names]


class SeenOperators(TorchDispatchMode):
    """A mode that lists the operators of torch's dispatcher that are called in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def run(op: str, case: Case, t: Operands, algo: str = "auto") -> Tensor:
    """The operation by the extension; the operands may be of any layout."""
    if op == "forward":
        return C.forward(t.x, t.w, t.bias, *case.geometry, algo=algo)
    if op == "grad_input":
        return C.grad_input(t.dy, t.w, case.input_size, *case.geometry, algo=algo)
    return C.grad_weight(t.x, t.dy, case.kernel, *case.geometry, algo=algo)


def run_if_accepted(op: str, case: Case, t: Operands, algo: str) -> Tensor | None:
    """As `run`, but None where a forced algorithm declines a problem that it may decline."""
    try:
        return run(op, case, t, algo)
    except RuntimeError as error:
        assert f"algo='{algo}' cannot take this problem: " in str(error), error
        assert not must_accept(algo, case, t), f"{algo} declines {case!r}: {error}"
        return None


def must_accept(algo: str, case: Case, t: Operands) -> bool:
    """Whether the algorithm is made for such a problem, so that declining it is a fault."""
    if algo == "reference" or t.w.dtype == torch.int64:
        return algo == "reference"
    if algo == "depthwise":
        channels_last = all(
            tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
            for tensor in (t.x, t.dy)
        )
        return case.groups == case.c_in == case.c_out and channels_last and not t.w.is_complex()
    if algo == "winograd":
        # Taps of a phase that follow each other; their number and distances are bounded.
        neighbours = any(
            kernel >= 2 * stride and dilation == 1
            for kernel, stride, dilation in zip(case.kernel, case.stride, case.dilation)
        )
        small = math.prod(case.kernel) <= 64 and math.prod(case.stride) <= 16
        plain = all(
            tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)
            for tensor in (t.x, t.dy)
        )
        plain &= not t.w.is_complex()  # its parts are strided
        return neighbours and small and plain and min(case.input_size) > 2
    assert algo in ("direct", "gemm"), f"say here what {algo} is made for"
    return True


def define_wide(op: str, case: Case, t: Operands, wide: DTypeLike) -> NDArray[Any]:
    """The operation by its definition, in a dtype of NumPy; linear, nothing is conjugated."""
    plain = [tensor.detach().resolve_conj().resolve_neg() for tensor in t]
    if t.w.dtype in (torch.float16, torch.bfloat16):
        plain = [tensor.float() for tensor in plain]
    x, w, bias, dy = (np.ascontiguousarray(tensor.numpy(), wide) for tensor in plain)
    with np.errstate(invalid="ignore"):
        if op == "forward":
            return reference.forward(case, x, w, bias)
        if op == "grad_input":
            return reference.grad_input(case, dy, w)
        return reference.grad_weight(case, x, dy)


def define(op: str, case: Case, t: Operands) -> Tensor:
    """The operation by its definition, in float64, complex128 or int64."""
    wide = np.complex128 if t.w.is_complex() else np.float64
    return torch.from_numpy(
        define_wide(op, case, t, np.int64 if t.w.dtype == torch.int64 else wide)
    )


def run_torch(op: str, case: Case, t: Operands) -> Tensor:
    """The operation by torch's own operator, where the padding allows it."""
    if op == "forward":
        return torch.nn.functional.conv_transpose2d(t.x, t.w, t.bias, **case.torch_arguments)
    # Autograd conjugates the other operand of a product; conjugated beforehand, it does not.
    x, w = (tensor.conj().detach().requires_grad_() for tensor in (t.x, t.w))
    y = torch.nn.functional.conv_transpose2d(x, w, **case.torch_arguments)
    return torch.autograd.grad(y, x if op == "grad_input" else w, t.dy)[0]


@functools.cache
def exact(case: Case, is_complex: bool) -> tuple[Operands, dict[str, Tensor]]:
    """Operands of small integers, as int64 or complex128, and the exact result of each."""
    t = case.operands(
        sum(map(ord, case.name)), torch.complex128 if is_complex else torch.int64, exact=True
    )
    return t, {op: define(op, case, t) for op in OPERATIONS}


def cast(t: Operands, dtype: torch.dtype, layout: str = "contiguous") -> Operands:
    """The same numbers in another dtype and layout; the bias stays a plain vector."""
    x, w, bias, dy = (tensor.to(dtype) for tensor in t)
    return Operands(relayout(x, layout), relayout(w, layout), bias, relayout(dy, layout))


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, to compare NaN and the sign of zero as well."""
    plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return plain.contiguous().view(sizes[plain.itemsize])


def assert_same_bits(got: Tensor, want: Tensor, what: object) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape, what
    different = bits(got) != bits(want)
    assert not different.any(), f"{what}: {int(different.sum())} of {got.numel()} differ"


def assert_equal(got: Tensor, want: Tensor, what: object) -> None:
    """Equal numbers (NaN equals NaN, 0 equals -0), dtype, shape; else the first difference."""
    assert got.dtype == want.dtype and got.shape == want.shape, (
        f"{what}: got {got.dtype} {tuple(got.shape)}, want {want.dtype} {tuple(want.shape)}"
    )
    different = (got != want) & ~((got != got) & (want != want))
    if different.any():
        where = tuple(different.nonzero()[0].tolist())
        pytest.fail(
            f"{what}: {int(different.sum())} of {got.numel()} differ, first at {where}: "
            f"got {got[where].item()}, want {want[where].item()}"
        )


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the kernels of one instruction set."""
    before = C.cpu_isa()
    C.set_cpu_isa(name)
    try:
        yield
    finally:
        C.set_cpu_isa(before)


@contextmanager
def stream_results() -> Iterator[None]:
    """Write results of any size past the caches, as large ones are."""
    before = C.streamed_from()
    C.set_streamed_from(0)
    try:
        yield
    finally:
        C.set_streamed_from(before)


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def implementations(*operations: str, best_isa: bool = False) -> pytest.MarkDecorator:
    """Parametrise over (op, algo, isa): all there is in the binary and runs on this machine.

    The reference is the same code for every instruction set, so it appears once. What multiplies
    pairs has a product of its own, and all else in common with AVX-512.
    """

    def isas(algo: str) -> list[str]:
        names = [i for i in C.cpu_isas() if algo == "gemm" or i not in ("amx", "avx512_bf16")]
        return names[:1] if best_isa or algo == "reference" else names

    rows = [
        pytest.param(op, algo, isa, id=f"{op}-{algo}-{isa}")
        for op in operations or OPERATIONS
        for algo in C.list_algorithms(op)
        for isa in isas(algo)
    ]
    return pytest.mark.parametrize("op,algo,isa", rows)


def each_dtype(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes or DTYPES, ids=dtype_name)
