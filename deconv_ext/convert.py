"""Swap every `nn.ConvTranspose2d` of a model for ours, in place, and back.

A layer is converted by assigning its `__class__`. The module object, and with it everything that
is attached to it or refers to it (parameters, hooks, a second place in the model, an optimizer's
references), stays exactly what it was; only the method `forward` is another one.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from .modules import ConvTranspose2d

#: The attribute of a converted module that holds the class to go back to.
_ORIGIN = "_converted_from"


@dataclasses.dataclass
class LayerReport:
    """One transposed convolution of the model and what became of it."""

    name: str  # as in named_modules(); "" is the model itself
    arguments: str
    converted: bool
    reason: str = ""  # why it was left alone
    max_abs: float | None = None  # largest difference from torch's layer on the same input
    max_rel: float | None = None  # the same divided by the largest absolute value of torch's result


@dataclasses.dataclass
class ConversionReport:
    """What `convert` did: a row for each layer and, given a sample, how far the results differ."""

    layers: list[LayerReport]
    max_abs: float | None = None  # of the model's outputs before and after
    max_rel: float | None = None

    @property
    def converted(self) -> int:
        return sum(layer.converted for layer in self.layers)

    def __str__(self) -> str:
        rows = [("layer", "arguments", "status", "max abs diff", "max rel diff")]
        for layer in self.layers:
            status = "converted" if layer.converted else f"left alone: {layer.reason}"
            rows.append(
                (
                    layer.name or "(the model)",
                    layer.arguments,
                    status,
                    _number(layer.max_abs),
                    _number(layer.max_rel),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"{self.converted} of {len(self.layers)} layers converted")
        if self.max_abs is not None:
            lines[-1] += (
                f"; largest difference of the model's output: {_number(self.max_abs)}"
                f" ({_number(self.max_rel)} of its largest value)"
            )
        return "\n".join(lines)


def convert(
    model: nn.Module,
    sample: Any = None,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> ConversionReport:
    """Let every `nn.ConvTranspose2d` of the model compute with our kernels; `revert` undoes it.

    Works in place and shares everything: parameters, buffers, hooks, parametrizations. Subclasses
    are converted too (and stay instances of their class), unless they bring a forward of their
    own: those are left alone, and the report says so.

    Args:
        model: a module, which may itself be a transposed convolution.
        sample: an input of the model: a tensor, a tuple of arguments or a dict of keywords. With
            it the model runs before and after the conversion, in eval mode and without
            gradients, and the report holds the differences.
        where: called with the name and the module; False leaves the layer alone.

    Returns:
        A report, which prints as a table.
    """
    before = None if sample is None else _run(model, sample)
    report, converted = ConversionReport([]), {}
    for name, module in model.named_modules():
        if not _is_transposed_convolution(module):
            continue
        reason = _obstacle(module)
        if not reason and where is not None and not where(name, module):
            reason = "excluded by the caller"
        layer = LayerReport(name, module.extra_repr(), not reason, reason)
        report.layers.append(layer)
        if layer.converted:
            converted[module] = layer
            module.__dict__[_ORIGIN] = origin = _bottom(module)
            _set_bottom(module, _converted(origin))
    if before is not None:
        handles = [
            module.register_forward_hook(_comparison(layer), prepend=True, with_kwargs=True)
            for module, layer in converted.items()
        ]
        try:
            report.max_abs, report.max_rel = _difference(_run(model, sample), before)
        finally:
            for handle in handles:
                handle.remove()
    return report


def revert(model: nn.Module) -> int:
    """Undo `convert`: every converted layer gets its class back. Returns the number of layers.

    Raises:
        RuntimeError: the class of a layer has been changed by something else since; nothing is
            reverted then.
    """
    converted = [(n, m) for n, m in model.named_modules() if _ORIGIN in m.__dict__]
    for name, module in converted:
        if _bottom(module) is not _converted(module.__dict__[_ORIGIN]):
            raise RuntimeError(
                f"layer {name!r} has become a {type(module).__name__} since convert(); "
                f"undo that first"
            )
    for _, module in converted:
        _set_bottom(module, module.__dict__.pop(_ORIGIN))
    return len(converted)


# --- which layers --------------------------------------------------------------------------------


def _is_transposed_convolution(module: nn.Module) -> bool:
    """Also true of what only looks like one: quantised and scripted modules, to report them."""
    name = getattr(module, "original_name", type(module).__name__)
    return isinstance(module, nn.ConvTranspose2d) or (
        "ConvTranspose2d" in name and hasattr(module, "output_padding")
    )


def _obstacle(module: nn.Module) -> str:
    """Why the module cannot be converted; empty if it can."""
    cls = type(module)
    if not isinstance(module, nn.ConvTranspose2d):
        return f"{cls.__module__}.{cls.__name__} is no nn.ConvTranspose2d"
    if isinstance(module, ConvTranspose2d):
        return "already one of ours"
    if isinstance(module, LazyModuleMixin):
        return "lazy: convert after a first call has set its sizes"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if cls.forward is not nn.ConvTranspose2d.forward:
        owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
        return f"{owner.__name__} overrides forward"
    return ""


# --- classes -------------------------------------------------------------------------------------


def _converted(origin: Any) -> type[nn.Module]:
    """The class that a module of the original class becomes."""
    return ConvTranspose2d if origin is nn.ConvTranspose2d else _mixed(origin)


@functools.cache
def _mixed(origin: Any) -> type[nn.Module]:
    """A subclass of the original class in which our forward comes before torch's."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # Unpickling finds a class by its name, which here only the original has.
        function, args, *rest = origin.__reduce_ex__(self, max(int(protocol), 2))
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function, args = _new_mixed, (origin,)
        return (function, args, *rest)

    body = {"__module__": origin.__module__, "__reduce_ex__": reduce}
    return type(origin.__name__, (origin, ConvTranspose2d), body)


def _new_mixed(origin: Any) -> nn.Module:
    mixed = _mixed(origin)
    return mixed.__new__(mixed)


def _has_parametrized_class(module: nn.Module) -> bool:
    """Whether the class is one that parametrize made, for this module alone, on top of its own."""
    cls = type(module)
    return cls.__name__ == f"Parametrized{cls.__bases__[0].__name__}" and bool(
        parametrize.is_parametrized(module)
    )


def _bottom(module: nn.Module) -> type[nn.Module]:
    """The class of the module, beneath parametrize's."""
    return type(module).__bases__[0] if _has_parametrized_class(module) else type(module)


#: Classes of parametrize's and what they were copied from, so that going back gives the same one.
_copied_from: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def _set_bottom(module: nn.Module, bottom: type[nn.Module]) -> None:
    """Exchange the class of the module; parametrize's stays on top."""
    top = type(module)
    if not _has_parametrized_class(module):
        module.__class__ = bottom
        return
    other = _copied_from.get(top)
    if other is None or other.__bases__ != (bottom,) or _tensors(other) != _tensors(top):
        body = {k: v for k, v in vars(top).items() if k not in ("__dict__", "__weakref__")}
        other = type(top.__name__, (bottom,), body)
        _copied_from[other] = top
    module.__class__ = other


def _tensors(cls: type) -> list[str]:
    """The names of the parametrized tensors, which are properties of parametrize's class."""
    return sorted(name for name, value in vars(cls).items() if isinstance(value, property))


# --- differences ---------------------------------------------------------------------------------


def _run(model: nn.Module, sample: Any) -> list[Tensor]:
    """The tensors of the model's output, computed without leaving a trace in model or sample."""
    sample = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, sample)
    args, kwargs = ((), sample) if isinstance(sample, dict) else (sample, {})
    args = args if isinstance(args, tuple) else (args,)
    training = [(module, module.training) for module in model.modules()]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(cuda):
            torch.manual_seed(0)
            output = model(*args, **kwargs)
    finally:
        for module, mode in training:
            module.training = mode
    return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _comparison(layer: LayerReport) -> Callable[..., None]:
    """A forward hook that notes how far the output is from what torch makes of the same input."""

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        want = nn.ConvTranspose2d.forward(module, *args, **kwargs)
        largest, relative = _difference([output], [want])
        layer.max_abs = max(largest, layer.max_abs or 0)
        layer.max_rel = max(relative, layer.max_rel or 0)

    return hook


def _difference(got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
    """The largest difference, absolute and divided by the largest absolute value wanted."""
    if [t.shape for t in got] != [t.shape for t in want]:
        return math.inf, math.inf
    largest = scale = 0.0
    for a, b in zip(got, want, strict=True):
        if a.numel() == 0:
            continue
        wide = torch.complex128 if a.is_complex() else torch.float64
        a, b = a.to(wide), b.to(wide)
        same = (a == b) | ((a != a) & (b != b))
        error = (a - b).abs().masked_fill(same, 0).nan_to_num(nan=math.inf)
        largest = max(largest, error.max().item())
        scale = max(scale, b.abs().nan_to_num(nan=0, posinf=0).max().item())
    return largest, largest / scale if scale else math.inf if largest else 0.0


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"
