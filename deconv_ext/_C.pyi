"""The binary module. Tensors are 4-D; pairs are (h, w), padding is (top, bottom, left, right)."""

from typing import Any

from torch import Tensor

Pair = tuple[int, int]
Sides = tuple[int, int, int, int]

def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Sides,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    algo: str = "auto",
) -> Tensor: ...
def forward_activated(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Sides,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    activation: str,
    negative_slope: float,
    algo: str = "auto",
) -> Tensor: ...
def grad_input(
    dy: Tensor,
    w: Tensor,
    input_size: Pair,
    stride: Pair,
    padding: Sides,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    algo: str = "auto",
) -> Tensor: ...
def grad_weight(
    x: Tensor,
    dy: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Sides,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
    algo: str = "auto",
) -> Tensor: ...
def grad_bias(dy: Tensor) -> Tensor: ...
def recorded_forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Sides,
    output_padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor | None: ...
def output_size(
    input_size: Pair,
    kernel_size: Pair,
    stride: Pair,
    padding: Sides,
    output_padding: Pair,
    dilation: Pair,
) -> Pair: ...
def list_algorithms(op: str, device: str = "cpu") -> list[str]: ...
def tap_table(
    size_in: int,
    kernel: int,
    stride: int,
    dilation: int,
    pad_begin: int,
    pad_end: int,
    output_padding: int,
) -> dict[str, Any]: ...
def set_choices(algorithms: dict[tuple[int, ...], str]) -> None: ...
def record_calls(enabled: bool) -> list[list[int]]: ...
def cpu_isas() -> list[str]: ...
def cpu_isa() -> str: ...
def set_cpu_isa(name: str) -> None: ...
def idle_output_bytes() -> int: ...
def empty_output_pool() -> None: ...
def streamed_from() -> int: ...
def set_streamed_from(bytes: int) -> None: ...
def compiled() -> dict[str, Any]: ...
