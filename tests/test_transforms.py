"""Training recipes around the layer, each against torch's layer: penalties, AMP, checkpointing.

Single derivatives, forward mode and torch.func are examined one by one in test_autograd.py.
"""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import deconv_ext


def network(layers, seed=0, dtype=torch.float64):
    """A small generator of the given namespace, torch.nn or deconv_ext; equal weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        layers.ConvTranspose2d(4, 6, 4, 2, 1, dtype=dtype),
        nn.Tanh(),
        layers.ConvTranspose2d(6, 3, 3, 2, 1, 1, groups=3, dtype=dtype),
    )


def image(dtype=torch.float64):
    return torch.randn(2, 4, 5, 3, dtype=dtype)


def test_gradient_penalty_of_wgan():
    """(|d critic / d x| - 1)^2, whose gradient is a double backward."""
    x, results = image(), []
    for layers in (deconv_ext, nn):
        model, sample = network(layers), x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(sample).sum(), sample, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        results.append(torch.autograd.grad(penalty, list(model.parameters())[::2]))
    assert_close(*results)


TRANSFORMS = {
    "grad": lambda f, w, x, v: grad(lambda w: f(w, x).square().sum())(w),
    "vjp": lambda f, w, x, v: vjp(lambda x: f(w, x), x)[1](f(w, x).cos()),
    "jvp": lambda f, w, x, v: jvp(lambda x: f(w, x), (x,), (v,)),
    "hessian": lambda f, w, x, v: hessian(lambda s: f(w, x * s).sin().sum())(v.mean()),
    "per-sample gradients": lambda f, w, x, v: vmap(
        grad(lambda w, x: f(w, x).square().sum()), (None, 0)
    )(w, x),
    "ensemble": lambda f, w, x, v: vmap(f, (0, None))(
        {name: torch.stack([p, 2 * p, -p]) for name, p in w.items()}, x
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_a_network(name):
    x, v, results = image(), image(), []
    for layers in (deconv_ext, nn):
        model = network(layers)
        weights = {key: p.detach() for key, p in model.named_parameters()}

        def function(weights, x, model=model):
            return functional_call(model, weights, x)

        results.append(TRANSFORMS[name](function, weights, x, v))
    assert_close(*results)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["whole", "sequential"])
def test_activation_checkpointing(how, reentrant):
    model, x = network(deconv_ext), image().requires_grad_()
    want = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    if how == "whole":
        y = checkpoint(model, x, use_reentrant=reentrant)
    else:
        y = checkpoint_sequential(model, 2, x, use_reentrant=reentrant)
    y.sin().sum().backward()
    for got, expected in zip(model.parameters(), want, strict=True):
        assert torch.equal(got.grad, expected)


def test_selective_checkpointing_sees_our_operator():
    """The policy may keep our result instead of computing it again."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    asked = []

    def policy(context, op, *args, **kwargs):
        asked.append(op)
        ours = op is torch.ops.deconv_ext.conv_transpose2d.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    model, x = network(deconv_ext), image().requires_grad_()
    (want,) = torch.autograd.grad(model(x).sum(), x)
    y = checkpoint(
        model, x, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    assert_close(torch.autograd.grad(y.sum(), x)[0], want)
    assert torch.ops.deconv_ext.conv_transpose2d.default in asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_amp_step_with_a_gradient_scaler(dtype):
    """autocast, scaled loss, step: the same weights as torch's, up to the lower precision."""
    x, after = image(torch.float32), []
    for layers in (deconv_ext, nn):
        model = network(layers, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        with torch.autocast("cpu", dtype):
            y = model(x)
            loss = y.float().square().mean()
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after.append([p.detach() for p in model.parameters()])
        assert scaler.get_scale() == 2.0**8, "no overflow"
    before = list(network(nn, dtype=torch.float32).parameters())
    assert not torch.equal(after[0][0], before[0])
    assert_close(*after, rtol=0.02, atol=2e-3)


def test_gradient_scaler_skips_a_step_with_infinities():
    model = network(deconv_ext, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = [p.clone() for p in model.parameters()]
    scaler.scale(model(image(torch.float32) * float("inf")).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_mixed_dtypes_are_refused_in_torchs_words(which):
    x, outcomes = torch.randn(2, 4, 5, 3), []
    for layers in (deconv_ext, nn):
        layer = layers.ConvTranspose2d(4, 6, 3)
        setattr(layer, which, nn.Parameter(getattr(layer, which).double()))
        with pytest.raises(RuntimeError) as caught:
            layer(x)
        outcomes.append(str(caught.value).lower())
    assert which in outcomes[0] and "should be the same" in outcomes[0]
    assert outcomes[1].startswith("input type") and "should be the same" in outcomes[1]
