"""Derivatives: of every order, in both modes, under torch.func, and no more than was asked for."""

import functools
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import deconv_ext
from deconv_ext import autograd, functional
from deconv_ext.functional import conv_transpose2d
from support import SeenOperators, kernel_calls

ARGUMENTS = {
    "stride": (2, 3),
    "padding": (1, 0),
    "output_padding": (1, 2),
    "groups": 2,
    "dilation": (1, 2),
}
ASYMMETRIC = {**ARGUMENTS, "padding": ((2, 0), (1, 3))}
#: The same for the functions of deconv_ext.autograd.
GEOMETRY = ((2, 3), (1, 1, 0, 0), (1, 2), (1, 2), 2)

ours = functools.partial(conv_transpose2d, **ARGUMENTS)
theirs = functools.partial(torch.nn.functional.conv_transpose2d, **ARGUMENTS)


def operands(dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[Tensor]:
    """x [2, 4, 3, 2], w [4, 3, 2, 3] for two groups, bias [6]."""
    shapes = ((2, 4, 3, 2), (4, 3, 2, 3), (6,))
    return [torch.randn(s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


def energy(function, *args: Tensor) -> Tensor:
    """A real number of all of the output, nonlinear in it."""
    y = function(*args)
    return (y * y.conj()).real.sin().sum()


@pytest.fixture(params=["C++", "Python"], autouse=True)
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who records a plain call: the node of csrc/autograd.cpp, or the Functions of autograd.py,
    which have all other calls and are stood up for by the same tests."""
    if request.param == "Python":
        binary = deconv_ext.build.extension()
        double = SimpleNamespace(compiled=binary.compiled, recorded_forward=lambda *args: None)
        monkeypatch.setattr(functional, "extension", lambda: double)
    return request.param


# --- what is computed, built and kept ------------------------------------------------------------

SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations("xwb", n)]
GRADIENT_OF = {"x": "grad_input", "w": "grad_weight", "b": "grad_bias"}


@pytest.mark.parametrize("asked", SUBSETS, ids="".join)
@pytest.mark.parametrize("how", ["requires_grad", "grad of leaves", "grad of results", "backward"])
def test_backward_computes_what_was_asked_for(asked, how):
    tensors = dict(zip("xwb", operands(), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(how != "requires_grad" or name in asked)
    if how == "grad of results":
        tensors = {name: tensor * 1 for name, tensor in tensors.items()}
    wanted = [tensors[name] for name in asked]

    def step():
        y = ours(*tensors.values())
        if how == "backward":
            y.sum().backward(inputs=wanted)
        else:
            torch.autograd.grad(y.sum(), wanted)

    assert kernel_calls(step) == ["forward", *(GRADIENT_OF[name] for name in asked)]


def test_double_backward_computes_what_was_asked_for():
    x, w, _ = operands()
    x.requires_grad_()
    dy = torch.randn_like(ours(x, w), requires_grad=True)
    (dx,) = torch.autograd.grad(ours(x, w), x, dy, create_graph=True)
    assert kernel_calls(lambda: dx.sum().backward()) == ["forward"]  # for dy; w is a constant


@pytest.mark.parametrize("asked", SUBSETS, ids="".join)
def test_only_operands_of_wanted_derivatives_are_kept(asked):
    tensors = dict(zip("xwb", operands(), strict=True))
    for name in asked:
        tensors[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape), lambda _: None):
        ours(*tensors.values())
    want = [tensors[kept] for kept, wanted in ("xw", "wx") if wanted in asked]
    assert kept == [tensor.shape for tensor in want]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_no_function_is_built_where_nothing_is_recorded(mode, node, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a Function was built")

    x, w, b = operands(requires_grad=mode is not torch.enable_grad)
    monkeypatch.setattr(torch.autograd.Function, "apply", refuse)
    with mode():
        assert ours(x, w, b).grad_fn is None
        assert ours(x[0], w).grad_fn is None
    recording = pytest.raises(AssertionError, match="a Function was built")
    with torch.enable_grad(), recording if node == "Python" else nullcontext():
        assert ours(x, w.detach().requires_grad_(), b).grad_fn is not None


# --- first and higher orders ---------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [ARGUMENTS, ASYMMETRIC], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_numerical_derivatives(dtype, kwargs):
    def function(*args):
        return conv_transpose2d(*args, **kwargs)

    args = tuple(operands(dtype, requires_grad=True))
    checks = {"fast_mode": True, "check_batched_grad": True}
    gradcheck(function, args, check_forward_ad=True, check_batched_forward_grad=True, **checks)
    gradgradcheck(function, args, check_fwd_over_rev=True, check_rev_over_rev=True, **checks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_third_order(dtype):
    """By finite differences: torch's own operator fails here, for it has an output_padding."""

    def gradients(*args):
        return torch.autograd.grad(energy(ours, *args), args, create_graph=True)

    gradgradcheck(gradients, tuple(operands(dtype, requires_grad=True)), fast_mode=True)


def test_backward_twice_and_unbatched():
    x, w, b = operands(requires_grad=True)
    y, want = ours(x[0], w, b), theirs(x[0], w, b)
    dy = torch.randn_like(y)
    first = torch.autograd.grad(y, (x, w, b), dy, retain_graph=True)
    second = torch.autograd.grad(y, (x, w, b), dy)
    assert_close(first, torch.autograd.grad(want, (x, w, b), dy))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- with the rest of autograd -------------------------------------------------------------------


def test_backward_under_a_mode_that_the_forward_did_not_see():
    args = operands(requires_grad=True)
    y, want = ours(*args), theirs(*args)
    dy = torch.randn_like(y)
    with SeenOperators() as mode:
        got = torch.autograd.grad(y, args, dy)
    assert_close(got, torch.autograd.grad(want, args, dy))
    operators = autograd.operators()
    assert {operators[name] for name in GRADIENT_OF.values()} <= set(mode.seen)


def test_gradient_with_a_tangent_of_a_call_without_one():
    args = operands(requires_grad=True)
    results = [ours(*args), theirs(*args)]
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(*(torch.randn_like(results[0]) for _ in range(2)))
        got, want = (torch.autograd.grad(y, args, dy) for y in results)
        for pair in zip(got, want, strict=True):
            assert_close(*map(forward_ad.unpack_dual, pair))


def test_gradient_that_is_a_wrapper():
    """Its memory is not to be read: here there is none."""
    args = operands(requires_grad=True)
    y = ours(*args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        dy = mode.from_tensor(torch.empty_like(y))
    grads = torch.autograd.grad(y, args, dy)
    assert [(type(g), g.shape) for g in grads] == [(FakeTensor, t.shape) for t in args]


def test_error_in_the_backward_pass_reaches_the_caller():
    """One from Python, through the engine and the node."""
    args = operands(requires_grad=True)
    y = ours(*args)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        for _ in range(2):
            torch.autograd.grad(y, args, torch.ones_like(y))
    y = ours(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autograd, "grad_bias", lambda dy: {}["no bias"])
        with pytest.raises(KeyError, match="no bias"):
            torch.autograd.grad(y, args, torch.ones_like(y), create_graph=True)


def test_change_in_place_of_a_kept_tensor_is_found():
    x, w, b = operands(requires_grad=True)
    kept = w * 1
    y = ours(x, kept, b)
    kept.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    args = operands(requires_grad=True)
    y = checkpoint(ours, *args, use_reentrant=reentrant)
    got = torch.autograd.backward(y.sum()) or [t.grad for t in args]
    want = torch.autograd.grad(theirs(*args).sum(), args)
    assert_close(got, list(want))


def test_saved_tensor_hooks():
    args, packed = operands(requires_grad=True), []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.numpy(force=True)

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
        y = ours(*args)
    assert packed == [tuple(args[0].shape), tuple(args[1].shape)]
    assert_close(torch.autograd.grad(y.sum(), args), torch.autograd.grad(theirs(*args).sum(), args))


def test_batched_backward_and_vectorized_jacobian():
    args = tuple(operands(requires_grad=True))
    y = ours(*args)
    dy = torch.randn(5, *y.shape, dtype=y.dtype)
    got = torch.autograd.grad(y, args, dy, is_grads_batched=True)
    want = torch.autograd.grad(theirs(*args), args, dy, is_grads_batched=True)
    assert_close(got, want)
    jacobian = torch.autograd.functional.jacobian
    assert_close(jacobian(ours, args, vectorize=True), jacobian(theirs, args))


def test_vectorized_hessian():
    args = tuple(operands(requires_grad=True)[:2])
    hess = torch.autograd.functional.hessian
    both = [functools.partial(energy, f) for f in (ours, theirs)]
    assert_close(hess(both[0], args, vectorize=True), hess(both[1], args))


def test_backward_batched_at_several_levels():
    """In the vmap of is_grads_batched, a tensor may lack the level that is the innermost."""
    x, w, b = operands(requires_grad=True)
    y = ours(x, w, b)
    dy, scale = torch.randn(3, 5, *y.shape, dtype=y.dtype), torch.randn(2, dtype=y.dtype)
    old_vmap = torch._vmap_internals._vmap

    def pull_back(dy):
        return torch.autograd.grad(y, (x, w, b), dy, retain_graph=True)

    both = old_vmap(old_vmap(pull_back))(dy)
    outer = old_vmap(lambda dy: old_vmap(lambda s: s * pull_back(dy)[1])(scale))(dy[0])
    for i, j in itertools.product(range(3), range(5)):
        assert_close([g[i, j] for g in both], list(pull_back(dy[i, j])))
    for j in range(5):
        assert_close(outer[j], scale[:, None, None, None, None] * pull_back(dy[0, j])[1])


# --- forward mode --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", SUBSETS, ids="".join)
def test_dual_tensors(asked):
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(t, torch.randn_like(t)) if name in asked else t
            for name, t in zip("xwb", operands(), strict=True)
        ]
        assert_close(forward_ad.unpack_dual(ours(*duals)), forward_ad.unpack_dual(theirs(*duals)))


def test_forward_over_reverse():
    args = operands(torch.complex128, requires_grad=True)
    tangents = [torch.randn_like(t) for t in args]

    def hessian_vector_product(function):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(args, tangents, strict=True)]
            grads = torch.autograd.grad(energy(function, *duals), duals)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    assert_close(hessian_vector_product(ours), hessian_vector_product(theirs))


# --- torch.func ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_func_grad_vjp_jvp(dtype):
    args = operands(dtype)
    tangents = tuple(torch.randn_like(t) for t in args)
    scalar = [functools.partial(energy, f) for f in (ours, theirs)]
    assert_close(*(grad(f, (0, 1, 2))(*args) for f in scalar))
    assert_close(*(jvp(f, tuple(args), tangents) for f in (ours, theirs)))
    dy = torch.randn_like(ours(*args))
    assert_close(*(vjp(f, *args)[1](dy) for f in (ours, theirs)))


@pytest.mark.parametrize("outer", [jacfwd, jacrev])
@pytest.mark.parametrize("inner", [jacfwd, jacrev])
def test_func_second_order(outer, inner):
    args = operands()
    scalar = [functools.partial(energy, f) for f in (ours, theirs)]
    assert_close(*(outer(inner(f, (0, 1, 2)), (0, 1, 2))(*args) for f in scalar))


def test_func_third_order():
    x, w, b = (t[:1] for t in operands())
    x, w, b = x[:, :1], w[:, :1], b[:1]
    both = [
        functools.partial(f, stride=2, dilation=2)
        for f in (conv_transpose2d, torch.nn.functional.conv_transpose2d)
    ]
    got, want = (jacfwd(hessian(functools.partial(energy, f), 1), 0)(x, w, b) for f in both)
    assert_close(got, want)


def test_gradients_per_sample():
    """vmap(grad) over a module's functional call: the weight's gradient for each sample alone."""
    layer = deconv_ext.ConvTranspose2d(4, 6, 3, stride=2, groups=2, dtype=torch.float64)
    parameters = dict(layer.named_parameters())
    x = torch.randn(5, 4, 3, 4, dtype=torch.float64)

    def loss(parameters, sample):
        return functional_call(layer, parameters, sample).sin().sum()

    got = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        want = torch.autograd.grad(loss(parameters, sample), list(parameters.values()))
        assert_close([g[i] for g in got.values()], list(want))


def each_in_dims(*choices):
    """All combinations of places for the vmapped dimension, but not none at all."""
    return [dims for dims in itertools.product(*choices) if set(dims) != {None}]


@pytest.mark.parametrize(
    "in_dims", each_in_dims((None, 0, 1, -1), (None, 0, 2), (None, 0, 1)), ids=str
)
def test_vmap_of_forward(in_dims):
    check_vmap(lambda x, w, b: autograd.forward(x, w, b, GEOMETRY), in_dims, operands())


@pytest.mark.parametrize("in_dims", each_in_dims((None, 0, 1, -1), (None, 0, 2)), ids=str)
@pytest.mark.parametrize("operation", ["grad_input", "grad_weight"])
def test_vmap_of_gradients(operation, in_dims):
    x, w, b = operands()
    dy = torch.randn_like(autograd.forward(x, w, b, GEOMETRY))
    if operation == "grad_input":
        check_vmap(lambda *t: autograd.grad_input(*t, x.shape[2:], GEOMETRY), in_dims, [dy, w])
    else:
        check_vmap(lambda *t: autograd.grad_weight(*t, w.shape[2:], GEOMETRY), in_dims, [x, dy])


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_of_bias_gradient(dim):
    check_vmap(autograd.grad_bias, (dim,), [torch.randn(2, 6, 3, 4, dtype=torch.float64)])


def check_vmap(function, in_dims, tensors):
    """vmap against a loop; the batch has a size that no other dimension has."""
    size = 7
    stacked = [
        t if d is None else torch.stack([torch.randn_like(t) for _ in range(size)], d)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
    want = torch.stack(
        [
            function(
                *(t if d is None else t.select(d, i) for t, d in zip(stacked, in_dims, strict=True))
            )
            for i in range(size)
        ]
    )
    assert_close(vmap(function, in_dims)(*stacked), want)


def test_nested_vmap():
    x = torch.randn(5, 2, 4, 3, 2, dtype=torch.float64)
    w = torch.randn(7, 4, 3, 2, 3, dtype=torch.float64)
    nested = vmap(vmap(ours, (None, 0)), (0, None))
    want = torch.stack([torch.stack([theirs(a, b) for b in w]) for a in x])
    assert_close(nested(x, w), want)
