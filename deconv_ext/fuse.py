"""Fold batch norms into the transposed convolutions before them, for inference.

In eval mode a batch norm is `y -> scale * (y - mean) + shift` for each channel, with
`scale = gamma / sqrt(var + eps)`, and a transposed convolution is linear, so that

    w'[ci, co, k] = scale[co] * w[ci, co, k]
    b'[co] = scale[co] * (b[co] - mean[co]) + shift[co]

is both in one, whatever its groups and padding.
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
    """A transposed convolution or a batch norm after one, and what became of them."""

    layer: str  # as in named_modules()
    norm: str  # "" if none follows
    fused: bool
    reason: str = ""  # why it was left alone
    max_abs: float | None = None  # largest difference of the pair's output, in the whole model
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
        rows = [("layer", "batch norm", "status", "max abs diff", "max rel diff")]
        for pair in self.pairs:
            status = "fused" if pair.fused else f"left alone: {pair.reason}"
            rows.append((pair.layer, pair.norm, status, number(pair.max_abs), number(pair.max_rel)))
        summary = f"{self.fused} of {len(self.pairs)} layers fused"
        if self.note:
            summary = f"not traced ({self.note}): only neighbours in nn.Sequential\n{summary}"
        return table(rows, summary + total(self.max_abs, self.max_rel))


def fuse(model: nn.Module, sample: Any = None) -> FusionReport:
    """Fold every `nn.BatchNorm2d` into the transposed convolution whose output alone it takes.

    Works in place and cannot be undone: the layer gets new parameters, with a bias if it had none,
    and an `nn.Identity` takes the place of the batch norm. Copy the model before if it is to be
    trained again. Layers may be ours or torch's.

    Pairs are found by tracing the model with torch.fx: a pair is fused if each of the two is
    called once, and nothing else uses the layer's output or the parameters. A model that cannot be
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
    report, pairs = _candidates(model, modules)
    found = [(pair, modules[pair.layer], modules[pair.norm]) for pair in pairs]
    before: list[Tensor] | None = None
    outputs: dict[str, list[Tensor]] = {}
    if sample is not None:
        before, outputs = _observe(model, sample, {p.norm: norm for p, _, norm in found})
    for pair, layer, norm in found:
        _fold(layer, norm)
        _replace(model, norm, nn.Identity().train(norm.training))
        pair.fused = True
    if before is not None:
        after, folded = _observe(model, sample, {p.norm: layer for p, layer, _ in found})
        report.max_abs, report.max_rel = difference(after, before)
        for pair in pairs:
            if outputs[pair.norm]:
                pair.max_abs, pair.max_rel = difference(folded[pair.norm], outputs[pair.norm])
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
) -> tuple[FusionReport, list[PairReport]]:
    """A report on every transposed convolution, and the rows of it that can be fused."""
    note = ""
    try:
        found = _traced(_Tracer().trace(model), modules)
    except Exception as error:  # whatever the model's own code may raise when it meets a proxy
        note = f"{type(error).__name__}: {error}".splitlines()[0]
        found = _neighbours(model)
    report = FusionReport([], note)
    for name, module in modules.items():
        if isinstance(module, nn.ConvTranspose2d):
            norm, reason = found.get(name, ("", "no batch norm takes its output"))
            if norm and not reason:
                reason = _obstacle(module, modules[norm])
            report.pairs.append(PairReport(name, norm, False, reason))
    return report, [pair for pair in report.pairs if not pair.reason]


def _traced(graph: Any, modules: dict[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """For layers before a batch norm: its name, and why the two cannot become one, or ""."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = Counter(node.target for node in calls)
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found: dict[str, tuple[str, str]] = {}
    for call in calls:
        if not isinstance(modules[call.target], nn.BatchNorm2d):
            continue
        layer = call.args[0] if call.args else None
        if not isinstance(layer, fx.Node) or layer.op != "call_module":
            continue
        reason = ""
        if len(layer.users) > 1:
            reason = "its output is used elsewhere too"
        elif times[layer.target] > 1:
            reason = "it is called more than once"
        elif times[call.target] > 1:
            reason = "the batch norm is called more than once"
        elif read & {layer.target, call.target}:
            reason = "its parameters or the batch norm's are used elsewhere too"
        found[str(layer.target)] = (call.target, reason)
    return found


def _neighbours(model: nn.Module) -> dict[str, tuple[str, str]]:
    """The same for neighbours in an nn.Sequential, of a model that cannot be traced."""
    times = Counter(module for _, module in model.named_modules(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for module in model.modules():
        if not isinstance(module, nn.Sequential) or not _runs(module, nn.Sequential):
            continue
        children = list(module._modules.values())
        for layer, norm in zip(children, children[1:]):
            if isinstance(layer, nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
                shared = max(times[layer], times[norm]) > 1
                reason = "it or the batch norm stands elsewhere too" if shared else ""
                found[names[layer]] = (names[norm], reason)
    return found


def _runs(module: nn.Module, *classes: Any) -> bool:
    """Whether the module's forward is that of one of the classes."""
    return "forward" not in module.__dict__ and any(
        type(module).forward is cls.forward for cls in classes
    )


def _obstacle(layer: Any, norm: Any) -> str:
    """Why the two modules cannot become one; empty if they can."""
    for name, module in (("it", layer), ("the batch norm", norm)):
        if isinstance(module, LazyModuleMixin):
            return f"{name} is lazy: fuse after a first call has set its sizes"
        if not _runs(module, nn.ConvTranspose2d, ConvTranspose2d, nn.BatchNorm2d):
            return f"{name} has a forward of its own"
        if parametrize.is_parametrized(module):
            return f"{name} has parametrizations"
        if any(value for key, value in vars(module).items() if key in _HOOKS):
            return f"{name} has hooks"
    if norm.training:
        return "the batch norm is in training mode"
    if norm.running_mean is None:
        return "the batch norm has no running statistics"
    if norm.num_features != layer.out_channels:
        return "the batch norm has another number of channels"
    return ""


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
