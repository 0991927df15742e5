"""Fold batch norms and activations into the transposed convolutions before them, for inference.

In eval mode a batch norm is `y -> scale * (y - mean) + shift` for each channel, with
`scale = gamma / sqrt(var + eps)`, and a transposed convolution is linear, so that

    w'[ci, co, k] = scale[co] * w[ci, co, k]
    b'[co] = scale[co] * (b[co] - mean[co]) + shift[co]

is both in one, whatever its groups and padding. An activation goes into the store of the kernel:
the layer's argument `activation`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .modules import ConvTranspose2d
from .report import difference, number, run, table, total


@dataclasses.dataclass
class PairReport:
    """A transposed convolution, what follows it, and what became of them."""

    layer: str  # as in named_modules()
    norm: str = ""  # "" if none follows
    activation: str = ""  # the module after the norm, or after the layer; "" if none follows
    fused: bool = False  # at least one of the two
    reason: str = ""  # why it was left alone, or the activation was
    max_abs: float | None = None  # largest difference of their output, in the whole model
    max_rel: float | None = None  # the same divided by the largest absolute value before


@dataclasses.dataclass
class FusionReport:
    """What `fuse` did: a row for each layer and, given a sample, how far the results differ."""

    pairs: list[PairReport]
    note: str = ""  # why the model could not be traced
    max_abs: float | None = None  # of the model's outputs before and after
    max_rel: float | None = None

    @property
    def fused(self) -> int:
        return sum(pair.fused for pair in self.pairs)

    def __str__(self) -> str:
        rows = [("layer", "batch norm", "activation", "status", "max abs diff", "max rel diff")]
        for pair in self.pairs:
            status = "fused" if pair.fused else f"left alone: {pair.reason}"
            if pair.fused and pair.reason:
                status += f", but not the activation: {pair.reason}"
            differences = number(pair.max_abs), number(pair.max_rel)
            rows.append((pair.layer, pair.norm, pair.activation, status, *differences))
        summary = f"{self.fused} of {len(self.pairs)} layers fused"
        if self.note:
            summary = f"not traced ({self.note}): only neighbours in nn.Sequential\n{summary}"
        return table(rows, summary + total(self.max_abs, self.max_rel))


def fuse(model: nn.Module, sample: Any = None) -> FusionReport:
    """Fold every `nn.BatchNorm2d` into the transposed convolution whose output alone it takes,
    and an activation after the two, or after the layer alone.

    Works in place and cannot be undone: the layer gets new parameters, with a bias if it had none,
    and its argument `activation`, and an `nn.Identity` takes the place of what was folded in. Copy
    the model before if it is to be trained again. Layers may be ours or torch's; torch's take no
    activation. Activations are the modules `nn.ReLU`, `nn.LeakyReLU`, `nn.SiLU`, `nn.GELU` (the
    exact form), `nn.Tanh` and `nn.Sigmoid`.

    They are found by tracing the model with torch.fx: modules are fused if each of them is called
    once, and nothing else uses what lies between them, or the parameters. A model that cannot be
    traced has its pairs fused where they are neighbours in an `nn.Sequential` and stand nowhere
    else in the model; that it calls them only through the `nn.Sequential` is taken for granted.

    Args:
        model: in eval mode.
        sample: an input of the model: a tensor, a tuple of arguments or a dict of keywords. With
            it the model runs before and after, without gradients, and the report holds the
            differences.

    Returns:
        A report, which prints as a table.

    Raises:
        RuntimeError: the model is in training mode, where a batch norm depends on the batch.
    """
    if model.training:
        raise RuntimeError(
            "fuse() folds the running statistics of batch norms, which only eval mode uses, "
            "but got a model with training=True: call model.eval() first"
        )
    modules = dict(model.named_modules())
    report, followers = _candidates(model, modules)
    layers = {name: modules[name] for name in followers}
    before: list[Tensor] | None = None
    outputs: dict[str, list[Tensor]] = {}
    if sample is not None:
        last = {layer: modules[names[-1]] for layer, names in followers.items()}
        before, outputs = _observe(model, sample, last)
    for layer, names in followers.items():
        for follower in (modules[name] for name in names):
            fold = _fold if isinstance(follower, nn.BatchNorm2d) else _fold_activation
            fold(layers[layer], follower)
            _replace(model, follower, nn.Identity().train(follower.training))
    if before is not None:
        after, folded = _observe(model, sample, layers)
        report.max_abs, report.max_rel = difference(after, before)
        for pair in report.pairs:
            if outputs.get(pair.layer):
                pair.max_abs, pair.max_rel = difference(folded[pair.layer], outputs[pair.layer])
    return report


# --- which pairs ---------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Does not look into our layers, as fx does not into torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.ConvTranspose2d, _BatchNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


def _candidates(
    model: nn.Module, modules: dict[str, nn.Module]
) -> tuple[FusionReport, dict[str, list[str]]]:
    """A report on every transposed convolution, and for each what can be folded into it."""
    note = ""
    try:
        found = _traced(_Tracer().trace(model), modules)
    except Exception as error:  # whatever the model's own code may raise when it meets a proxy
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        found = _neighbours(model)
    report = FusionReport([], note)
    followers = {}
    for name, module in modules.items():
        if isinstance(module, nn.ConvTranspose2d):
            pair, foldable = _examine(name, modules, found)
            report.pairs.append(pair)
            if foldable:
                followers[name] = foldable
    return report, followers


#: For modules before a batch norm or an activation: its name, and why they cannot be one, or "".
_Found = dict[str, tuple[str, str]]


def _examine(
    name: str, modules: dict[str, nn.Module], found: _Found
) -> tuple[PairReport, list[str]]:
    """The row of a layer, and the names of the modules after it that can be folded into it."""
    pair, foldable, layer = PairReport(name), list[str](), modules[name]
    follower, reason = found.get(name, ("", "no batch norm or activation takes its output"))
    if follower and isinstance(modules[follower], nn.BatchNorm2d):
        pair.norm = follower
        pair.reason = reason or _norm_obstacle(layer, modules[follower])
        if pair.reason:
            return pair, foldable
        foldable.append(follower)
        follower, reason = found.get(follower, ("", ""))
    pair.activation, pair.reason = follower, reason
    if follower:
        pair.reason = reason or _activation_obstacle(layer, modules[follower])
        if not pair.reason:
            foldable.append(follower)
    pair.fused = bool(foldable)
    return pair, foldable


def _is_follower(module: nn.Module) -> bool:
    return isinstance(module, (nn.BatchNorm2d, *_ACTIVATIONS))


def _word(module: nn.Module) -> str:
    """What a module is called in the report."""
    if isinstance(module, nn.ConvTranspose2d):
        return "it"
    return "the batch norm" if isinstance(module, nn.BatchNorm2d) else "the activation"


def _traced(graph: Any, modules: dict[str, nn.Module]) -> _Found:
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found: _Found = {}
    for call in calls:
        if not _is_follower(modules[call.target]):
            continue
        before = call.args[0] if call.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        word, first = _word(modules[call.target]), _word(modules[str(before.target)])
        reason = ""
        if len(before.users) > 1:
            whose = "its" if first == "it" else f"{first}'s"
            reason = f"{whose} output is used elsewhere too"
        elif times[before.target] > 1:
            reason = f"{first} is called more than once"
        elif times[call.target] > 1:
            reason = f"{word} is called more than once"
        elif read & {before.target, call.target}:
            reason = f"its parameters or {word}'s are used elsewhere too"
        found[str(before.target)] = (call.target, reason)
    return found


def _neighbours(model: nn.Module) -> _Found:
    """The same for neighbours in an nn.Sequential, of a model that cannot be traced."""
    times = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for module in model.modules():
        if not isinstance(module, nn.Sequential) or not _runs(module, nn.Sequential):
            continue
        children = list(module._modules.values())
        for before, after in zip(children, children[1:]):
            if before is None or after is None or not _is_follower(after):
                continue
            shared = max(times[before], times[after]) > 1
            reason = f"{_word(before)} or {_word(after)} stands elsewhere too" if shared else ""
            found[names[before]] = (names[after], reason)
    return found


def _runs(module: nn.Module, *classes: Any) -> bool:
    """Whether the module's forward is that of one of the classes."""
    return "forward" not in module.__dict__ and any(
        type(module).forward is cls.forward for cls in classes
    )


def _obstacle(*modules: Any) -> str:
    """Why what follows must not become one with what is before it; empty if it may."""
    for module in modules:
        word = _word(module)
        if isinstance(module, LazyModuleMixin):
            return f"{word} is lazy: fuse after a first call has set its sizes"
        known = (nn.ConvTranspose2d, ConvTranspose2d, nn.BatchNorm2d, *_ACTIVATIONS)
        if not _runs(module, *known):
            return f"{word} has a forward of its own"
        if any(value for key, value in vars(module).items() if key in _HOOKS):
            return f"{word} has hooks"
    if getattr(modules[0], "activation", None):
        return f"it has an activation already: {modules[0].activation!r}"
    return ""


def _norm_obstacle(layer: Any, norm: Any) -> str:
    if reason := _obstacle(layer, norm):
        return reason
    for module in (layer, norm):
        if parametrize.is_parametrized(module):
            return f"{_word(module)} has parametrizations"
    if norm.training:
        return "the batch norm is in training mode"
    if norm.running_mean is None:
        return "the batch norm has no running statistics"
    if norm.num_features != layer.out_channels:
        return "the batch norm has another number of channels"
    return ""


def _activation_obstacle(layer: Any, activation: Any) -> str:
    if reason := _obstacle(layer, activation):
        return reason
    if not _runs(layer, ConvTranspose2d):
        return "torch's own layer takes no activation: convert() the model before"
    if getattr(activation, "approximate", "none") != "none":
        return f"the activation is GELU(approximate={activation.approximate!r})"
    if not layer.weight.is_floating_point():
        return f"there are no activations of {layer.weight.dtype}"
    return ""


#: Modules and what they are called as an argument.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


# --- one pair ------------------------------------------------------------------------------------


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    """Give the layer parameters with which it does the work of both."""
    wide = torch.float64
    scale = (norm.running_var.to(wide) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    bias = -norm.running_mean.to(wide)
    if layer.bias is not None:
        bias = bias + layer.bias.to(wide)
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.to(wide)
    weight = layer.weight.to(wide).unflatten(0, (layer.groups, -1))
    weight = (weight * scale.view(layer.groups, 1, -1, 1, 1)).flatten(0, 1)

    old: Tensor = layer.weight
    layer.weight = nn.Parameter(torch.empty_like(old).copy_(weight), old.requires_grad)
    layer.bias = nn.Parameter(bias.to(old.dtype), old.requires_grad)


def _fold_activation(layer: Any, activation: Any) -> None:
    (layer.activation,) = (n for cls, n in _ACTIVATIONS.items() if isinstance(activation, cls))
    layer.negative_slope = float(getattr(activation, "negative_slope", 0.01))


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _observe(
    model: nn.Module, sample: Any, watched: dict[str, nn.Module]
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The tensors of the model's output, and those of the modules."""
    seen: dict[str, list[Tensor]] = {name: [] for name in watched}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen[name].append(output.clone())

    handles = [module.register_forward_hook(hook(name)) for name, module in watched.items()]
    try:
        return run(model, sample), seen
    finally:
        for handle in handles:
            handle.remove()
