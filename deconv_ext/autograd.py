"""Derivatives of the transposed convolution: of every order, in both modes, under torch.func.

The operator and its gradients are the three contractions of one trilinear form over x, w and y
(and a bias): each is linear in its two operands, and its derivative for one of them is another of
the three. A complex gradient conjugates the operand that stays. Written out once, in three
Functions that call each other, this gives derivatives of every order.

Call `forward`, `grad_input`, `grad_weight` and `grad_bias` (lower case): they record only what may
be differentiated. Where somebody looks on at torch's dispatcher (a mode, a tracer, fake tensors),
they call the operators of ops.py, which record by the same formulas. `geometry` is (stride,
padding, output_padding, dilation, groups) as the binary module takes it: pairs (h, w), but padding
(top, bottom, left, right).

`forward_activated` applies an activation in the kernel's store. Where its derivative can be told
from the output, its backward needs nothing else; for the others, and for transforms and forward
mode, it is `forward` and torch's activation.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function, forward_ad

from . import activation
from .build import extension

Geometry = tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int], tuple[int, int], int]


class Forward(Function):
    """(x [N, C_in, H, W], w [C_in, C_out/groups, kH, kW], bias [C_out] or None, geometry)
    -> y [N, C_out, OH, OW]."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        *operands, geometry = args
        return _compute("forward", *operands, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, ctx.geometry = inputs
        ctx.input_size, ctx.kernel_size, ctx.shape = x.shape[2:], w.shape[2:], output.shape
        _save(ctx, x, w)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return _forward_gradients(ctx, grads[0], *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _product_rule(
            ctx,
            tangents,
            lambda x, w: forward(x, w, None, ctx.geometry),
            lambda tb: tb[:, None, None].expand(ctx.shape),
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        (x, w, bias, geometry), (x_dim, w_dim, bias_dim, _) = args, in_dims
        if bias_dim is not None and w_dim is None:  # a bias follows the channels of its weight
            w, w_dim = w.expand(info.batch_size, *w.shape), 0
        fold = _Fold(info.batch_size, geometry, "ngo", ngi=x_dim, gio=w_dim)
        if bias is not None and fold.axis != "n":
            if bias_dim is None:
                bias, bias_dim = bias.expand(info.batch_size, *bias.shape), 0
            bias = fold(bias, bias_dim, "go")
        y = forward(fold(x, x_dim, "ngi"), fold(w, w_dim, "gio"), bias, fold.geometry)
        return fold.undo(y, "ngo"), 0


class ForwardActivated(Function):
    """(x, w, bias or None, (*geometry, activation, negative_slope)) -> activation(Forward(...))."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        *operands, extended = args
        return _compute("forward_activated", *operands, *extended)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, bias, (*geometry, ctx.activation, ctx.negative_slope) = inputs
        ctx.geometry = tuple(geometry)
        ctx.input_size, ctx.kernel_size = x.shape[2:], w.shape[2:]
        ctx.set_materialize_grads(False)
        ctx.known_by_output = activation.is_known_by_output(ctx.activation, ctx.negative_slope)
        if ctx.known_by_output:
            needs = ctx.needs_input_grad
            ctx.save_for_backward(x if needs[1] else None, w if needs[0] else None, output)
        else:
            ctx.save_for_backward(x, w, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy,), (x, w, value) = grads, ctx.saved_tensors
        if dy is None:
            return None, None, None, None
        if not ctx.known_by_output:
            value = forward(x, w, value, ctx.geometry)  # so far it is the bias
        dz = activation.gradient(ctx.activation, ctx.negative_slope, dy, value)
        return _forward_gradients(ctx, dz, x, w)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        *operands, (*geometry, name, slope) = args
        z, dim = Forward.vmap(info, in_dims, *operands, tuple(geometry))
        return activation.FUNCTIONS[name](z, slope), dim


class GradInput(Function):
    """(dy, w, input_size (H, W), geometry) -> dx [N, C_in, H, W]."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        dy, w, size, geometry = args
        return _compute("grad_input", dy, w, size, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, w, ctx.input_size, ctx.geometry = inputs
        ctx.kernel_size = w.shape[2:]
        _save(ctx, dy, w)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,), (dy, w), needs = grads, ctx.saved_tensors, _wanted(ctx)
        if g is None:
            return None, None, None, None
        return (
            forward(g, w.conj(), None, ctx.geometry) if needs[0] else None,
            grad_weight(g, dy.conj(), ctx.kernel_size, ctx.geometry) if needs[1] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _product_rule(
            ctx, tangents, lambda dy, w: grad_input(dy, w, ctx.input_size, ctx.geometry)
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        (dy, w, size, geometry), (y_dim, w_dim, _, _) = args, in_dims
        fold = _Fold(info.batch_size, geometry, "ngi", ngo=y_dim, gio=w_dim)
        dx = grad_input(fold(dy, y_dim, "ngo"), fold(w, w_dim, "gio"), size, fold.geometry)
        return fold.undo(dx, "ngi"), 0


class GradWeight(Function):
    """(x, dy, kernel_size (kH, kW), geometry) -> dw [C_in, C_out/groups, kH, kW]."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        x, dy, size, geometry = args
        return _compute("grad_weight", x, dy, size, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, dy, ctx.kernel_size, ctx.geometry = inputs
        ctx.input_size = x.shape[2:]
        _save(ctx, x, dy)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (g,), (x, dy), needs = grads, ctx.saved_tensors, _wanted(ctx)
        if g is None:
            return None, None, None, None
        return (
            grad_input(dy.conj(), g, ctx.input_size, ctx.geometry) if needs[0] else None,
            forward(x.conj(), g, None, ctx.geometry) if needs[1] else None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _product_rule(
            ctx, tangents, lambda x, dy: grad_weight(x, dy, ctx.kernel_size, ctx.geometry)
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        (x, dy, size, geometry), (x_dim, y_dim, _, _) = args, in_dims
        fold = _Fold(info.batch_size, geometry, "gio", ngi=x_dim, ngo=y_dim)
        dw = grad_weight(fold(x, x_dim, "ngi"), fold(dy, y_dim, "ngo"), size, fold.geometry)
        return fold.undo(dw, "gio"), 0


class GradBias(Function):
    """(dy [N, C_out, OH, OW]) -> db [C_out]: the sum over all but the channels."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return _compute("grad_bias", *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.shape = inputs[0].shape
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor | None:
        (g,) = grads
        return None if g is None else g[:, None, None].expand(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return grad_bias(*tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        dy = _join(args[0].movedim(in_dims[0], 1), 1)
        return _split(grad_bias(dy), 0, info.batch_size), 0


# --- the way to the kernels ----------------------------------------------------------------------


def _compute(name: str, *args: Any) -> Tensor:
    """The value: from the binary module, or by torch's dispatcher if somebody looks on there."""
    function = operators()[name] if is_watched(args) else getattr(extension(), name)
    result: Tensor = function(*args)
    return result


def is_watched(args: tuple[Any, ...]) -> bool:
    """Whether a dispatch mode, `torch.jit.trace` or a kind of tensor must see an operator."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return True
    for arg in args:
        kind = type(arg)
        if kind not in _USUAL and issubclass(kind, Tensor) and not holds_data(kind):
            return True
    return False


#: What nearly all arguments are; to look them up first saves a microsecond a call.
_USUAL = frozenset((Tensor, torch.nn.Parameter, type(None), tuple, torch.Size))


@functools.cache
def holds_data(kind: type[Tensor]) -> bool:
    """False for wrappers such as FakeTensor and DTensor: their memory is not to be read."""
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


@functools.cache
def operators() -> dict[str, Any]:
    """The operators of `torch.ops.deconv_ext` by the names of the binary module's functions."""
    from .ops import OPERATORS

    return OPERATORS


class _Fold:
    """How a vmapped operation becomes one operation on larger tensors.

    Channels split into groups, a tensor has three axes before the spatial ones: x "ngi", w "gio",
    y "ngo". With one operand vmapped, the new dimension joins the axis that this operand shares
    with the result alone; with both, it joins the groups.
    """

    def __init__(self, batch: int, geometry: Geometry, result: str, **dims: int | None):
        vmapped = [axes for axes, dim in dims.items() if dim is not None]
        self.batch, self.groups = batch, geometry[-1]
        self.axis = "g" if len(vmapped) > 1 else (set(vmapped[0]) & set(result) - {"g"}).pop()
        self.geometry = (*geometry[:-1], self.groups * (batch if self.axis == "g" else 1))

    def __call__(self, tensor: Tensor, dim: int | None, axes: str) -> Tensor:
        """The tensor with its vmapped dimension, if it has one, merged into the axis."""
        if dim is None:
            return tensor
        at, g = axes.index(self.axis), axes.index("g")
        tensor = _split(tensor.movedim(dim, 0), g + 1, self.groups)
        return _join(_join(tensor.movedim(0, at), at), g)

    def undo(self, result: Tensor, axes: str) -> Tensor:
        """The result with the vmapped dimension taken out of the axis and put first."""
        at, g, groups = axes.index(self.axis), axes.index("g"), self.geometry[-1]
        result = _split(_split(result, g, groups), at, self.batch)
        return _join(result.movedim(at, 0), g + 1)


def _split(tensor: Tensor, axis: int, parts: int) -> Tensor:
    """An axis as two, the first of that length. (The old vmap below has no unflatten, flatten.)"""
    size = tensor.shape[axis]
    return tensor.reshape(*tensor.shape[:axis], parts, size // parts, *tensor.shape[axis + 1 :])


def _join(tensor: Tensor, axis: int) -> Tensor:
    """An axis and the next as one."""
    first, second, *rest = tensor.shape[axis:]
    return tensor.reshape(*tensor.shape[:axis], first * second, *rest)


def _save(ctx: Any, a: Tensor, b: Tensor) -> None:
    """Keep each operand only if the derivative for the other one may be asked for."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None
    )
    ctx.save_for_forward(a, b)


def gradients(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor | None,
    input_size: Any,
    kernel_size: Any,
    geometry: Geometry,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """What comes back to x, w and the bias of `forward`, each if it is wanted; csrc/autograd.cpp
    calls this where its own way does not do. `x` may be missing unless dw is wanted, and `w`
    unless dx is."""
    return (
        grad_input(dy, w.conj(), input_size, geometry) if w is not None and wanted[0] else None,
        grad_weight(x.conj(), dy, kernel_size, geometry) if x is not None and wanted[1] else None,
        grad_bias(dy) if wanted[2] else None,
    )


def _forward_gradients(
    ctx: Any, dy: Tensor | None, x: Tensor | None, w: Tensor | None
) -> tuple[Tensor | None, ...]:
    """`gradients` as the backward of a Function, which has an argument more."""
    if dy is None:
        return None, None, None, None
    wanted = _wanted(ctx)
    return *gradients(dy, x, w, ctx.input_size, ctx.kernel_size, ctx.geometry, wanted), None


def _wanted(ctx: Any) -> list[bool]:
    """Which operands' derivatives this backward pass will use.

    `needs_input_grad` is decided when the graph is built: it says yes to the weight even in
    `torch.autograd.grad(y, x)`. The engine knows better, but refuses to answer (RuntimeError) for
    a leaf whose gradient is the result, or where it is not running as usual.
    """
    wanted = list(ctx.needs_input_grad)
    for i, (node, _) in enumerate(ctx.next_functions):
        try:
            wanted[i] = node is not None and torch._C._will_engine_execute_node(node)
        except RuntimeError:
            pass
    return wanted


def _product_rule(
    ctx: Any,
    tangents: tuple[Any, ...],
    product: Callable[[Tensor, Tensor], Tensor],
    bias_term: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The tangent of product(a, b), to which a bias may have been added.

    torch turns forward mode off around a Function's jvp. That would lose the tangents of an outer
    torch.func.jvp, so it is on here, and the operands are stripped of this level's tangents.
    """
    a, b = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
    with forward_ad._set_fwd_grad_enabled(True):
        terms = [
            None if tangents[0] is None else product(tangents[0], b),
            None if tangents[1] is None else product(a, tangents[1]),
            bias_term(tangents[2]) if bias_term and tangents[2] is not None else None,
        ]
        return functools.reduce(operator.add, [term for term in terms if term is not None])


def _under_legacy_vmap(operation: type[Function], args: tuple[Any, ...]) -> Tensor:
    """The operation on tensors of the vmap that `torch.autograd.grad(is_grads_batched=True)` uses.

    It knows nothing of Functions, so its innermost level is taken off and put back here.
    """
    for level in range(63, 0, -1):  # as many as it has; the count of those in use is per thread
        # A tensor without this level gains an empty dimension instead.
        peeled = [
            torch._remove_batch_dim(a, level, 0, 0) if isinstance(a, Tensor) else a for a in args
        ]
        sizes = [a.shape[0] if isinstance(a, Tensor) else 0 for a in peeled]
        if batch_size := max(sizes):
            break
    tensors = [new if size else old for old, new, size in zip(args, peeled, sizes, strict=True)]
    in_dims = tuple(0 if size else None for size in sizes)
    result, _ = operation.vmap(SimpleNamespace(batch_size=batch_size), in_dims, *tensors)
    # Forward mode calls as_strided on it, which wants the batch first in memory too.
    return torch._add_batch_dim(result.contiguous(), 0, level)


def _recorded(name: str, operation: type[Function]) -> Callable[..., Tensor]:
    """The call that applies a Function, or only computes its value where nothing asks for more.

    torch.func needs a Function with `setup_context`, which costs tens of microseconds a call;
    elsewhere a twin with everything in `forward(ctx, ...)` does the same for a few.
    """

    def compute(*args: Any) -> Any:
        for arg in args:
            if isinstance(arg, Tensor) and is_legacy_batchedtensor(arg):
                return _under_legacy_vmap(operation, args)
        return operation.forward(*args)

    def forward(ctx: Any, *args: Any) -> Any:
        output = compute(*args)
        operation.setup_context(ctx, args, output)
        return output

    body = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(Function.setup_context),
    }
    twin: Any = type(f"ConvTranspose2d{operation.__name__}", (operation,), body)

    def call(*args: Any) -> Any:
        if _are_functorch_transforms_active():
            return operation.apply(*args)
        if forward_ad._current_level >= 0:  # inside dual_level()
            return twin.apply(*args)
        if is_watched(args):
            *operands, geometry = args if len(args) > 1 else (*args, ())
            return operators()[name](*operands, *geometry)
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return twin.apply(*args)
        return compute(*args)

    return call


forward = _recorded("forward", Forward)
_forward_activated = _recorded("forward_activated", ForwardActivated)
grad_input = _recorded("grad_input", GradInput)
grad_weight = _recorded("grad_weight", GradWeight)
grad_bias = _recorded("grad_bias", GradBias)


def forward_activated(
    x: Tensor, w: Tensor, bias: Tensor | None, geometry: Geometry, name: str, slope: float
) -> Tensor:
    """activation(forward(...)), in one kernel unless something asks for the value between."""
    if (
        _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or needs_value_between((x, w, bias), name, slope)
    ):
        return activation.FUNCTIONS[name](forward(x, w, bias, geometry), slope)
    return _forward_activated(x, w, bias, (*geometry, name, slope))


def needs_value_between(operands: tuple[Tensor | None, ...], name: str, slope: float) -> bool:
    """Whether a derivative will be asked for that only the input of the activation tells."""
    if activation.is_known_by_output(name, slope) or not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in operands)
