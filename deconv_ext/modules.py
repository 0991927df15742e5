"""`ConvTranspose2d`, a drop-in for torch's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import functional


class ConvTranspose2d(torch.nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on the kernels of this package.

    Arguments, defaults, initial weights, state_dict and pickles are torch's. In addition,
    `padding` may be ((top, bottom), (left, right)), or "same" or "valid" as TensorFlow means them
    (see `functional.conv_transpose2d`).

    Shapes: input [N, C_in, H, W] or [C_in, H, W], weight [C_in, C_out/groups, kH, kW],
    bias [C_out], output [N, C_out, OH, OW] or [C_out, OH, OW].

    Raises:
        TypeError: a stride, padding, output_padding or dilation that is no integer.
        ValueError: an impossible number of channels or groups, or an unknown padding name.
    """

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
    ) -> None:
        ours = isinstance(padding, str) or functional.is_two_sided(padding)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            0 if ours else padding,
            output_padding,
            groups,
            bias,
            dilation,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        if ours:
            self.padding = padding
        self._resolve(self.output_padding)  # a mistake is better met here than at the first call
        if ours and not isinstance(padding, str):
            two_sided: Any = tuple(tuple(side) for side in padding)
            self.padding = two_sided

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The transposed convolution of [N, C_in, H, W] or [C_in, H, W].

        `output_size`, (OH, OW) or the whole shape, chooses among the sizes that `output_padding`
        can give; another size raises ValueError.
        """
        padding, output_padding = self.padding, self.output_padding
        if output_size is not None:
            padding, output_padding = self._fit(input, output_size)
        return functional.conv_transpose2d(
            input,
            self.weight,
            self.bias,
            self.stride,
            padding,
            output_padding,
            self.groups,
            self.dilation,
        )

    def _resolve(self, output_padding: Any) -> Any:
        """(stride, dilation, (sides, output_padding)) in full, or the error that they deserve."""
        stride = functional.pair("stride", self.stride)
        dilation = functional.pair("dilation", self.dilation)
        output_padding = functional.pair("output_padding", output_padding)
        shape = (self.in_channels, self.out_channels, *self.kernel_size)
        return (
            stride,
            dilation,
            functional.resolve_padding(self.padding, shape, stride, output_padding, dilation),
        )

    def _fit(self, input: Tensor, output_size: Any) -> tuple[Any, Any]:
        """(padding, output_padding) that give the output size."""
        stride, dilation, ((top, bottom, left, right), least) = self._resolve(0)
        # A kernel without dilation and padding gives the same sizes: torch's rules and messages
        # then serve asymmetric padding too.
        kernel = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, dilation, strict=True)]
        kernel = [kernel[0] - top - bottom, kernel[1] - left - right]
        extra = tuple(self._output_padding(input, output_size, list(stride), [0, 0], kernel, 2))
        if isinstance(self.padding, str) and extra != least:
            raise ValueError(
                f"padding={self.padding!r} decides the output size by itself, "
                f"but got output_size={output_size}"
            )
        return ((top, bottom), (left, right)), extra
