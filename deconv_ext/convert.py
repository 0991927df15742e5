"""Swap every `nn.ConvTranspose2d` of a model for ours, in place, and back.

A layer is converted by assigning its `__class__`. The module object, and with it everything that
is attached to it or refers to it (parameters, hooks, a second place in the model, an optimizer's
references), stays exactly what it was; only the method `forward` is another one.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .modules import ConvTranspose1d, ConvTranspose2d
from .report import difference, number, run, table, total

#: torch's layers and ours.
_TWINS: dict[Any, Any] = {
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose1d: ConvTranspose1d,
}

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
                    number(layer.max_abs),
                    number(layer.max_rel),
                )
            )
        summary = f"{self.converted} of {len(self.layers)} layers converted"
        return table(rows, summary + total(self.max_abs, self.max_rel))


def convert(
    model: nn.Module,
    sample: Any = None,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    one_dimensional: bool = False,
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
        one_dimensional: convert every `nn.ConvTranspose1d` too.

    Returns:
        A report, which prints as a table.
    """
    before = None if sample is None else run(model, sample)
    report, converted = ConversionReport([]), {}
    for name, module in model.named_modules():
        base = _torchs(module, one_dimensional)
        if base is None:
            continue
        reason = _obstacle(module, base)
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
            report.max_abs, report.max_rel = difference(run(model, sample), before)
        finally:
            for handle in handles:
                handle.remove()
    return report


def revert(model: nn.Module) -> int:
    """Undo `convert`: every converted layer gets its class back. Returns the number of layers.

    Raises:
        RuntimeError: the class of a layer has been changed by something else since, or the layer
            has got an activation, which torch's has not; nothing is reverted then.
    """
    converted = [(n, m) for n, m in model.named_modules() if _ORIGIN in m.__dict__]
    for name, module in converted:
        if _bottom(module) is not _converted(module.__dict__[_ORIGIN]):
            raise RuntimeError(
                f"layer {name!r} has become a {type(module).__name__} since convert(); "
                f"undo that first"
            )
        if getattr(module, "activation", None) is not None:
            raise RuntimeError(
                f"layer {name!r} has got activation={module.activation!r} since convert(), which "
                f"torch's layer would not compute"
            )
    for _, module in converted:
        _set_bottom(module, module.__dict__.pop(_ORIGIN))
    return len(converted)


# --- which layers --------------------------------------------------------------------------------


def _torchs(module: nn.Module, one_dimensional: bool) -> Any:
    """Which of torch's layers the module is, or looks like (quantised and scripted ones, to report
    them); None for others."""
    name = getattr(module, "original_name", type(module).__name__)
    for base in list(_TWINS)[: 1 + one_dimensional]:
        alike = base.__name__ in name and hasattr(module, "output_padding")
        if isinstance(module, base) or alike:
            return base
    return None


def _obstacle(module: nn.Module, base: Any) -> str:
    """Why the module cannot be converted; empty if it can."""
    cls = type(module)
    if not isinstance(module, base):
        return f"{cls.__module__}.{cls.__name__} is no nn.{base.__name__}"
    if isinstance(module, _TWINS[base]):
        return "already one of ours"
    if isinstance(module, LazyModuleMixin):
        return "lazy: convert after a first call has set its sizes"
    if "forward" in module.__dict__:
        return "its forward has been replaced on the instance"
    if cls.forward is not base.forward:
        owner = next(base for base in cls.__mro__ if "forward" in base.__dict__)
        return f"{owner.__name__} overrides forward"
    return ""


# --- classes -------------------------------------------------------------------------------------


def _converted(origin: Any) -> type[nn.Module]:
    """The class that a module of the original class becomes."""
    return _TWINS.get(origin) or _mixed(origin)


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
    twin = next(twin for base, twin in _TWINS.items() if issubclass(origin, base))
    return type(origin.__name__, (origin, twin), body)


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


def _comparison(layer: LayerReport) -> Callable[..., None]:
    """A forward hook that notes how far the output is from what torch makes of the same input."""

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        want = next(base for base in _TWINS if isinstance(module, base)).forward(
            module, *args, **kwargs
        )
        largest, relative = difference([output], [want])
        layer.max_abs = max(largest, layer.max_abs or 0)
        layer.max_rel = max(relative, layer.max_rel or 0)

    return hook
