"""torch's own samples of the operator and of the module, given to ours."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import deconv_ext
from deconv_ext.functional import conv_transpose2d

# Importing torch's test support forbids setting torch.backends.* flags, for the whole process.
vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True

OPS = {op.name: op for op in op_db}
OP = OPS["nn.functional.conv_transpose2d"]
MODULE = next(m for m in module_db if m.module_cls is torch.nn.ConvTranspose2d)
NUMERICAL = (torch.float64, torch.complex128)


def wide(tensor):
    """The same numbers in the widest dtype of their kind; anything but a tensor as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    copy = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
    return copy.requires_grad_(tensor.requires_grad)


def samples(dtype: torch.dtype, requires_grad: bool = False):
    """(operands, keywords) of each of torch's samples."""
    for sample in OP.sample_inputs("cpu", dtype, requires_grad=requires_grad):
        yield [sample.input, *sample.args], sample.kwargs


def differentiable(tensors):
    return [t for t in tensors if t is not None]


def test_torch_still_has_samples():
    assert len(list(samples(torch.float32))) >= 12
    assert {torch.float16, torch.complex64, torch.int64} < set(OP.supported_dtypes("cpu"))


@pytest.mark.parametrize("dtype", sorted(OP.supported_dtypes("cpu"), key=str), ids=str)
def test_values(dtype):
    for args, kwargs in samples(dtype):
        got = conv_transpose2d(*args, **kwargs)
        want = OP.op(*map(wide, args), **kwargs)
        assert got.dtype == dtype
        assert_close(got, want.to(dtype), msg=lambda text, kwargs=kwargs: f"{kwargs}: {text}")


@pytest.mark.parametrize("dtype", sorted(OP.supported_backward_dtypes("cpu"), key=str), ids=str)
def test_gradients(dtype):
    for args, kwargs in samples(dtype, requires_grad=True):
        y = conv_transpose2d(*args, **kwargs)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, differentiable(args), dy)
        wide_args = list(map(wide, args))
        want = torch.autograd.grad(OP.op(*wide_args, **kwargs), differentiable(wide_args), wide(dy))
        for a, b in zip(got, want, strict=True):
            assert_close(a, b.to(dtype), msg=lambda text, kwargs=kwargs: f"{kwargs}: {text}")


@pytest.mark.parametrize("dtype", NUMERICAL, ids=str)
def test_gradcheck(dtype):
    for args, kwargs in samples(dtype, requires_grad=True):
        gradcheck(
            lambda *tensors, args=args, kwargs=kwargs: conv_transpose2d(
                *tensors, *args[len(tensors) :], **kwargs
            ),
            differentiable(args),
            fast_mode=OP.gradcheck_fast_mode,
            check_forward_ad=OP.supports_forward_ad,
            check_batched_grad=OP.check_batched_grad,
            check_batched_forward_grad=OP.check_batched_forward_grad,
        )


@pytest.mark.parametrize("dtype", NUMERICAL, ids=str)
def test_gradgradcheck(dtype):
    for args, kwargs in samples(dtype, requires_grad=True):
        gradgradcheck(
            lambda *tensors, args=args, kwargs=kwargs: conv_transpose2d(
                *tensors, *args[len(tensors) :], **kwargs
            ),
            differentiable(args),
            gen_non_contig_grad_outputs=True,
            fast_mode=OP.gradcheck_fast_mode,
            check_batched_grad=OP.check_batched_gradgrad,
            check_fwd_over_rev=OP.supports_fwgrad_bwgrad,
        )


def outcome(function, *args, **kwargs):
    try:
        return tuple(function(*args, **kwargs).shape)
    except Exception as error:
        return type(error)


def test_error_inputs():
    """torch has none for the transposed convolution, so those of conv2d are tried on both."""
    found = []
    for op in (OP, OPS["nn.functional.conv2d"]):
        for error in op.error_inputs("cpu") if op.error_inputs_func else ():
            sample = error.sample_input
            args, kwargs = (sample.input, *sample.args), sample.kwargs
            if any(isinstance(value, str) for value in kwargs.values()):
                continue  # named padding is an extension of ours
            want = outcome(torch.nn.functional.conv_transpose2d, *args, **kwargs)
            assert outcome(conv_transpose2d, *args, **kwargs) == want, (kwargs, str(error))
            found.append(want)
    assert RuntimeError in found


@pytest.mark.parametrize("dtype", NUMERICAL, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_module(dtype, training, seed):
    inputs = MODULE.module_inputs_func(MODULE, "cpu", dtype, True, training)
    for case, kind in itertools.product(list(inputs), ("contiguous", "strided")):
        build, call = case.constructor_input, case.forward_input
        results = []
        for cls in (deconv_ext.ConvTranspose2d, torch.nn.ConvTranspose2d):
            torch.manual_seed(seed)
            module = cls(*build.args, **build.kwargs, dtype=dtype).train(training)
            x = call.args[0].detach()
            if kind == "strided":
                x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
            x.requires_grad_()
            y = module(x, *call.args[1:], **call.kwargs)
            loss = (y * y.conj()).real.sum()
            results.append((y, torch.autograd.grad(loss, [x, *module.parameters()])))
        assert_close(*results)
