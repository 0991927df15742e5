"""What the benchmark times: ours, torch's operator and a rewrite, on the same operands.

Each is a function without arguments, so that a timer needs to know nothing of convolutions.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import functional
from .bench_table import Row
from .bench_timing import Timer
from .build import extension
from .testing import Case, Operands

Function = Callable[[], Any]

OPERATIONS = ("forward", "grad_input", "grad_weight", "step")  # step: forward and backward
LAYOUTS = ("contiguous", "channels_last")
#: What the numbers are, and how products of them may be rounded: float32 is IEEE arithmetic.
PRECISIONS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
#: Largest error, relative to the largest value of the result, that is worth timing.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}


@contextlib.contextmanager
def attributes(owner: object, **values: object) -> Iterator[None]:
    """Attributes of `owner` set for a while."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def precision_setting(precision: str) -> Iterator[None]:
    """Both sides may use TF32 in "tf32" and must not in the others.

    Only the setting of convolutions and that of matrix products (for the rewrite and the roofline)
    are touched: torch raises if they are mixed with the older `allow_tf32`.
    """
    value = "tf32" if precision == "tf32" else "ieee"
    with (
        attributes(torch.backends.cudnn.conv, fp32_precision=value),  # type: ignore[attr-defined]
        attributes(torch.backends.cuda.matmul, fp32_precision=value),
    ):
        yield


@contextlib.contextmanager
def cudnn_search(tuned: bool) -> Iterator[None]:
    """Whether cuDNN times all its candidates for a new problem, or takes the one it guesses.

    torch asks its cache of plans first, whatever the setting. So a process should use one of both.
    """
    if not torch.backends.cudnn.is_available():
        yield
        return
    with attributes(torch.backends.cudnn, benchmark=tuned, benchmark_limit=0):
        yield


def operands(
    case: Case, precision: str, layout: str, device: torch.device, seed: int = 0
) -> Operands:
    """Normally distributed, made on the device; the same numbers whatever the layout."""
    dtype = PRECISIONS[precision]
    generator = torch.Generator(device).manual_seed(seed)
    source = torch.float64 if dtype == torch.float64 else torch.float32

    def fill(*shape: int) -> Tensor:
        plain = torch.randn(shape, generator=generator, device=device, dtype=source).to(dtype)
        if len(shape) == 4 and layout == "channels_last":
            # Not contiguous(): one channel is contiguous already, with strides that say NCHW.
            return torch.empty_like(plain, memory_format=torch.channels_last).copy_(plain)
        return plain

    return Operands(fill(*case.x_shape), fill(*case.w_shape), fill(case.c_out), fill(*case.y_shape))


def product(case: Case, op: str, t: Operands, algo: str) -> Function:
    """Forward or one gradient by our kernels, without autograd."""
    kernels, geometry = extension(), case.geometry
    if op == "forward":
        return lambda: kernels.forward(t.x, t.w, t.bias, *geometry, algo)
    if op == "grad_input":
        return lambda: kernels.grad_input(t.dy, t.w, case.input_size, *geometry, algo)
    return lambda: kernels.grad_weight(t.x, t.dy, case.kernel, *geometry, algo)


def _through_autograd(case: Case, op: str, t: Operands, function: Callable[..., Any]) -> Function:
    """The operator as a user calls it: forward, forward_grad or step."""
    leaves, arguments = (t.x, t.w, t.bias), case.torch_arguments
    if op != "step":
        return lambda: function(*leaves, **arguments)
    return lambda: torch.autograd.grad(function(*leaves, **arguments), leaves, t.dy)


def torch_product(case: Case, op: str, t: Operands) -> Function:
    """The same by torch's operator."""
    if op not in ("grad_input", "grad_weight"):
        return _through_autograd(case, op, t, F.conv_transpose2d)
    arguments = case.torch_arguments
    names = ("stride", "padding", "dilation")
    geometry = *(arguments[n] for n in names), True, arguments["output_padding"], case.groups
    wanted, mask = (0, [True, False, False]) if op == "grad_input" else (1, [False, True, False])
    return lambda: torch.ops.aten.convolution_backward(
        t.dy, t.x, t.w, [case.c_out], *geometry, mask
    )[wanted]


def _rewrite(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """For kernel == stride: one matrix product, then pixels (h, w, kh, kw) moved to their places.

    y[n, co, h*k + kh, w*k + kw] = bias[co] + sum over ci of x[n, ci, h, w] * w[ci, co, kh, kw]
    """
    c_in, c_out, k, _ = w.shape
    n, _, height, width = x.shape
    if x.is_contiguous():
        flat = torch.matmul(w.reshape(c_in, -1).t(), x.flatten(2)).unflatten(2, (height, width))
        return F.pixel_shuffle(flat + bias.repeat_interleave(k * k)[:, None, None], k)
    matrix = w.permute(2, 3, 1, 0).reshape(k * k * c_out, c_in)
    flat = F.linear(x.permute(0, 2, 3, 1), matrix, bias.repeat(k * k))
    tiles = flat.view(n, height, width, k, k, c_out).permute(0, 1, 3, 2, 4, 5)
    return tiles.reshape(n, height * k, width * k, c_out).permute(0, 3, 1, 2)


def can_rewrite(case: Case) -> bool:
    """Whether every output has one tap and the kernel is square, so that `_rewrite` is right."""
    plain = not any(case.padding + case.output_padding) and case.dilation == (1, 1)
    square = case.kernel == case.stride and case.kernel[0] == case.kernel[1]
    return plain and square and case.groups == 1


def contenders(
    case: Case,
    op: str,
    precision: str,
    layout: str,
    device: torch.device,
    algo: str = "auto",
    seed: int = 0,
) -> dict[str, Function]:
    """The functions "ours" and "torch", and "rewrite" where there is one: they compute the same."""
    t = operands(case, precision, layout, device, seed)
    # Operands that need no gradient make every side skip autograd, as under no_grad.
    for leaf in (t.x, t.w, t.bias):
        leaf.requires_grad_(op in ("forward_grad", "step"))
    if op in ("grad_input", "grad_weight") or algo != "auto":
        if op in ("forward_grad", "step"):
            raise ValueError(f"algo must be auto where autograd takes part, got {algo!r} for {op}")
        ours = product(case, op, t, algo)
    else:
        ours = _through_autograd(case, op, t, functional.conv_transpose2d)
    functions = {"ours": ours, "torch": torch_product(case, op, t)}
    if can_rewrite(case) and op in ("forward", "step"):

        def rewrite(x: Tensor, w: Tensor, bias: Tensor, **_: Any) -> Tensor:
            return _rewrite(x, w, bias)

        functions["rewrite"] = _through_autograd(case, op, t, rewrite)
    return functions


def results(function: Function) -> tuple[Tensor, ...]:
    """What it computes, as a tuple of float64 tensors."""
    found = function()
    found = (found,) if isinstance(found, Tensor) else found
    return tuple(tensor.detach().double() for tensor in found)


def truth(case: Case, op: str, precision: str, device: torch.device) -> tuple[Tensor, ...]:
    """The results in float64, by torch's own matrix products instead of cuDNN.

    So cuDNN's plan for float64, which has to be timed as well, is not settled here.
    """
    t = operands(case, precision, "contiguous", device)
    wide = Operands(*(tensor.double() for tensor in t))
    for leaf in (wide.x, wide.w, wide.bias):
        leaf.requires_grad_(op == "step")
    with attributes(torch.backends.cudnn, enabled=False):
        return results(torch_product(case, op, wide))


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Largest difference of any result, relative to the largest value of that result."""
    return max(
        (float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, want, strict=True)),
        key=lambda value: float("inf") if value != value else value,  # NaN is the worst
    )


def check(found: float, precision: str, what: str) -> None:
    """Raise ValueError if the error is too large: no point in timing a wrong result."""
    if not found <= TOLERANCE[precision]:
        raise ValueError(f"{what}: error {found:.1e}, more than {TOLERANCE[precision]:.0e}")


def measure(
    case: Case,
    op: str,
    precision: str,
    layouts: Sequence[str],
    timer: Timer,
    algo: str = "auto",
    compare: str = "torch",
) -> Iterator[Row]:
    """A row for each layout; all of them take part in the same turns.

    `compare` is "torch", as it is by default, or "tuned", with cuDNN's search among all candidates.
    """

    @functools.cache
    def make(copy: int) -> dict[str, Function]:
        return {
            f"{who} {layout}": function
            for layout in layouts
            for who, function in contenders(
                case, op, precision, layout, timer.device, algo, copy
            ).items()
        }

    with precision_setting(precision), cudnn_search(compare == "tuned"):
        want = truth(case, op, precision, timer.device)
        errors = {name: error(results(function), want) for name, function in make(0).items()}
        del want  # its memory may be needed
        for name, found in errors.items():
            check(found, precision, f"{case} {op} {precision} {name}")
        timings = timer.compare(make)
    make.cache_clear()
    work = 3 if op == "step" else 1  # the three products have the same size
    for layout in layouts:
        ours, theirs = timings[f"ours {layout}"], timings[f"torch {layout}"]
        rewrite = timings.get(f"rewrite {layout}")
        yield Row(
            layer=case.name,
            kind=case.kind,
            op=op,
            dtype=precision,
            layout=layout,
            ours_us=ours.us,
            torch_us=theirs.us,
            torch_best_us=min(timings[f"torch {each}"].us for each in layouts),
            flops=2 * work * case.macs,
            bytes=work * case.min_bytes(PRECISIONS[precision]),
            quiet=min(ours.quiet, theirs.quiet),
            noisy=ours.noisy or theirs.noisy,
            compare=compare,
            rewrite_us=rewrite.us if rewrite else None,
            ours_error=errors[f"ours {layout}"],
            torch_error=errors[f"torch {layout}"],
            ours_host_us=ours.host_us,
            torch_host_us=theirs.host_us,
            spread=max(ours.spread, theirs.spread),
            mode=ours.mode,
        )
