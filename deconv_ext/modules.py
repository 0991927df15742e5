"""`ConvTranspose2d`, a drop-in for torch's, and its relatives: lazy ones and those of 1-D."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import activation as activations
from . import functional
from .circular import Axis, extend
from .conv1d import conv_transpose1d, plane, single

if TYPE_CHECKING:
    from torch.nn.modules.conv import _ConvTransposeNd as _Torchs
else:
    _Torchs = object

PADDING_MODES = ("zeros", "circular")


class _Extended(_Torchs):
    """What our modules have beyond torch's, for any number of spatial dimensions.

    Stands before torch's class in the bases of a module, which says what `_dims`, `_operator` and
    `_planar` are for it.
    """

    _dims: int
    _operator: Callable[..., Tensor]
    #: The output size that a call gives if it names none.
    output_size: tuple[int, ...] | None = None
    #: What the kernel does to its result; the slope is that of "leaky_relu".
    activation: str | None = None
    negative_slope: float = 0.01

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        output_size: Any = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        _check_padding_mode(padding_mode)
        ours = isinstance(padding, str) or functional.is_two_sided(padding)
        torch_init: Any = super().__init__
        torch_init(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if ours else padding,
            output_padding,
            groups,
            bias,
            dilation,
            "zeros",
            device,
            dtype,
        )
        self.padding_mode = padding_mode  # type: ignore[assignment]
        if ours:
            self.padding = padding
        # A mistake is better met here than in a call.
        axes = self._axes(self.padding, self.output_padding)
        if ours and not isinstance(padding, str):
            two_sided: Any = tuple(tuple(side) for side in padding)
            self.padding = two_sided
        if padding_mode == "circular":
            # A call may yet choose another output_padding by its output_size.
            if any(not 0 <= a.output_padding - a.surplus < a.stride for a in axes):
                extend(torch.empty(()), axes)
        self._extend(output_size, activation, negative_slope)

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        """The transposed convolution of an input with or without a batch dimension.

        `output_size`, the spatial size or the whole shape, chooses among the sizes that
        `output_padding` can give, in place of the constructor's; another size raises ValueError.
        """
        padding: Any = self.padding
        output_padding: Any = self.output_padding
        size = self.output_size if output_size is None else output_size
        if size is not None:
            padding, output_padding = self._fit(input, size)
        if self.padding_mode != "zeros":
            _check_padding_mode(self.padding_mode)
            input, padding, output_padding = extend(input, self._axes(padding, output_padding))
        return self._operator(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            output_padding,
            self.groups,
            self.dilation,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def extra_repr(self) -> str:
        torch_repr: Any = super().extra_repr
        text: str = torch_repr()
        if self.output_size is not None:
            text += f", output_size={self.output_size}"
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text

    def _extend(self, output_size: Any, activation: Any, negative_slope: Any) -> None:
        """Take the arguments that torch's constructors do not know."""
        if output_size is not None:
            self.output_size = self._size(output_size)
        activations.check(activation, negative_slope)
        if activation is not None:
            self.activation, self.negative_slope = activation, float(negative_slope)

    def _planar(self, padding: Any, output_padding: Any) -> tuple[Any, ...]:
        """kernel_size, stride, padding, output_padding and dilation for the 2-D operator."""
        raise NotImplementedError

    def _axes(self, padding: Any, output_padding: Any) -> list[Axis]:
        """The arguments in full, one axis after the other, or the error that they deserve."""
        kernel, stride, padding, output_padding, dilation = self._planar(padding, output_padding)
        stride, dilation = functional.pair("stride", stride), functional.pair("dilation", dilation)
        output_padding = functional.pair("output_padding", output_padding)
        shape = (self.in_channels, self.out_channels, *kernel)
        sides, output_padding = functional.resolve_padding(
            padding, shape, stride, output_padding, dilation
        )
        extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        axes = map(Axis, extent, stride, sides[::2], sides[1::2], output_padding)
        return list(axes)[-self._dims :]

    def _fit(self, input: Tensor, output_size: Any) -> tuple[Any, Any]:
        """(padding, output_padding) that give the output size."""
        axes = self._axes(self.padding, 0)
        # A kernel without dilation and padding gives the same sizes: torch's rules and messages
        # then serve asymmetric padding too.
        extra = self._output_padding(
            input,
            output_size,
            [a.stride for a in axes],
            [0] * self._dims,
            [a.extent - a.begin - a.end for a in axes],
            self._dims,
        )
        if isinstance(self.padding, str) and extra != [a.output_padding for a in axes]:
            raise ValueError(
                f"padding={self.padding!r} decides the output size by itself, "
                f"but got output_size={output_size}"
            )
        return [(a.begin, a.end) for a in axes], extra

    def _size(self, output_size: Any) -> tuple[int, ...]:
        """The constructor's output_size, one int for each spatial dimension."""
        if self._dims == 1:
            size: tuple[int, ...] = (single("output_size", output_size),)
        else:
            size = functional.pair("output_size", output_size)
        if min(size) < 1:
            raise ValueError(f"output_size must be positive, but got output_size={output_size}")
        return size


def _check_padding_mode(mode: str) -> None:
    if mode not in PADDING_MODES:
        raise ValueError(
            f"padding mode must be one of {PADDING_MODES}, but got padding_mode={mode!r}"
        )


class ConvTranspose2d(_Extended, torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on the kernels of this package.

    Arguments, defaults, initial weights, state_dict and pickles are torch's. In addition:

    * `padding` may be ((top, bottom), (left, right)), or "same" or "valid" as TensorFlow means
      them (see `functional.conv_transpose2d`);
    * `padding_mode="circular"` wraps the output around, with a period of `size * stride`: the
      adjoint of a convolution with circular padding (equation: `deconv_ext/circular.py`). The
      other arguments must give an output of that size;
    * `output_size`, keyword only, an int or (OH, OW), is the default for that argument of
      `forward`, so that it can be chosen inside an `nn.Sequential`;
    * `activation`, keyword only, one of "relu", "leaky_relu" (with `negative_slope`), "silu",
      "gelu", "tanh" and "sigmoid", is applied to the output in the store of the kernel (see
      `functional.conv_transpose2d`).

    Shapes: input [N, C_in, H, W] or [C_in, H, W], weight [C_in, C_out/groups, kH, kW],
    bias [C_out], output [N, C_out, OH, OW] or [C_out, OH, OW].

    Raises:
        TypeError: a stride, padding, output_padding, dilation or output_size that is no integer.
        ValueError: an impossible number of channels or groups, an unknown padding name or mode or
            activation, or a circular output of another size than `size * stride`.
    """

    _dims = 2
    _operator = staticmethod(functional.conv_transpose2d)

    def _planar(self, padding: Any, output_padding: Any) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, padding, output_padding, self.dilation


class ConvTranspose1d(_Extended, torch.nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on the 2-D kernels of this package, as images of height 1.

    Arguments, defaults, initial weights, state_dict and pickles are torch's; `padding` may also
    be ((left, right),), "same" or "valid", and the other extensions are those of
    `ConvTranspose2d`.

    Shapes: input [N, C_in, L] or [C_in, L], weight [C_in, C_out/groups, K], bias [C_out],
    output [N, C_out, OL] or [C_out, OL].

    Raises:
        TypeError, ValueError: as `ConvTranspose2d`.
    """

    _dims = 1
    _operator = staticmethod(conv_transpose1d)

    def _planar(self, padding: Any, output_padding: Any) -> tuple[Any, ...]:
        arguments = plane(self.stride, padding, output_padding, self.dilation)
        return ((1, *self.kernel_size), *arguments)


class _Lazy:
    """The constructor of a lazy module: torch's, and our keywords."""

    def __init__(
        self,
        *args: Any,
        output_size: Any = None,
        activation: str | None = None,
        negative_slope: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._extend(output_size, activation, negative_slope)  # type: ignore[attr-defined]


class LazyConvTranspose2d(_Lazy, torch.nn.LazyConvTranspose2d, ConvTranspose2d):  # type: ignore[misc]
    """A `ConvTranspose2d` that takes `in_channels` from its first input.

    Arguments are those of `torch.nn.LazyConvTranspose2d` and the extensions of `ConvTranspose2d`,
    which it becomes in its first call.
    """

    cls_to_become = ConvTranspose2d


class LazyConvTranspose1d(_Lazy, torch.nn.LazyConvTranspose1d, ConvTranspose1d):  # type: ignore[misc]
    """A `ConvTranspose1d` that takes `in_channels` from its first input."""

    cls_to_become = ConvTranspose1d
