"""The CUDA kernels on the CPU: builds csrc/cuda with the C++ compiler and the machine that lies in
cuda_on_cpu/, and calls it with tensors of torch. See cuda_on_cpu/emulation.h for what it checks.

    PYTHONPATH=. python tests/emulator.py [PREFIX]      runs the algorithms of that prefix
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reference
from deconv_ext import compiler, toolchain
from deconv_ext.testing import EDGE, Case, Operands

HERE = Path(__file__).parent / "cuda_on_cpu"
CSRC = Path(__file__).parents[1] / "csrc"
MACHINE = (
    "threads.cpp",
    "checks.cpp",
    "instructions.cpp",
    "asynchronous.cpp",
    "counters.cpp",
    "api.cpp",
)
KERNELS = (
    *sorted((CSRC / "cuda").glob("*.cu")),
    *sorted((CSRC / "cuda").glob("*.cpp")),
)

FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas")
# Before each access the compiler calls a function; the machine has its own of that name. What a
# thread leaves uninitialised in its registers and its stack gets a pattern.
CHECKED = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")
PATTERN = ("-ftrivial-auto-var-init=pattern",)
SANITIZED = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")

OPERATIONS = ("forward", "grad_input", "grad_weight")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)

ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu", "tanh", "sigmoid")


def dtype_of(fmt: str) -> torch.dtype:
    """Of what is called by its dtype's name, or "tf32"."""
    return torch.float32 if fmt == "tf32" else getattr(torch, fmt)


class KernelError(Exception):
    """A mistake of a kernel: an access or a wait that hardware would not have forgiven."""


@functools.cache
def build(sources: tuple[Path, ...] | None = None, sanitize: bool = False) -> Path:
    """The library of these sources and the machine, compiled as far as it is not in the cache."""
    command, version = toolchain.cxx_compiler()
    cache = compiler.cache_dirs()[0] / "emulator"
    cache.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        checked = SANITIZED if sanitize else (*CHECKED, *PATTERN)
        if source.parent == HERE and source.suffix == ".cpp":
            checked = SANITIZED if sanitize else ("-O3",)
        flags = [*FLAGS, *checked, f"-I{HERE}", "-x", "c++"]
        listing = toolchain.output(*command.split(), *flags, "-MM", str(source))
        # A rule of make: target: names, where a backslash escapes a space or the end of a line.
        parts = re.findall(r"(?:\\.|[^\s\\])+", listing.replace("\\\n", " "))[1:]
        names = {re.sub(r"\\(.)", r"\1", part) for part in parts}
        digest = hashlib.sha256(f"{version} {flags} {source}".encode())
        for name in sorted(names):
            digest.update(Path(name).read_bytes())
        target = cache / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            call = [*command.split(), *flags, "-c", str(source), "-o", str(partial)]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name}:\n{toolchain.error_lines(done.stderr)}")
            partial.replace(target)
        return target

    # The machine first: of templates that both use, the linker keeps the first, and the machine's
    # own must not be checked.
    with compiler._locked(cache), ThreadPoolExecutor(toolchain.jobs()) as pool:
        objects = [
            *pool.map(compile_one, [*(HERE / name for name in MACHINE), *(sources or KERNELS)])
        ]
        names = " ".join(map(str, objects))
        library = cache / f"emulator-{hashlib.sha256(names.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}")
            link = [*command.split(), "-shared", "-Wl,-Bsymbolic", "-o", str(partial)]
            subprocess.run(
                [*link, *map(str, objects), *(SANITIZED if sanitize else ())], check=True
            )
            partial.replace(library)
    return library


# ---- the structs of csrc/params.h ---------------------------------------------------------------


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": [*fields.items()]})


_I64 = ctypes.c_int64
_AXIS = ("in", "out", "kernel", "stride", "dilation", "pad")
Axis = _struct("Axis", **dict.fromkeys(_AXIS, _I64))
Problem = _struct(
    "Problem", **dict.fromkeys(("batch", "c_in", "c_out", "groups"), _I64), h=Axis, w=Axis
)
TensorRef = _struct("TensorRef", data=ctypes.c_void_p, stride=_I64 * 4)
Params = _struct(
    "Params",
    problem=Problem,
    dtype=ctypes.c_int,
    x=TensorRef,
    w=TensorRef,
    y=TensorRef,
    bias=ctypes.c_void_p,
    bias_stride=_I64,
    activation=ctypes.c_int,
    negative_slope=ctypes.c_double,
)
GradBiasParams = _struct(
    "GradBiasParams",
    **dict.fromkeys(("batch", "c_out", "out_h", "out_w"), _I64),
    dtype=ctypes.c_int,
    dy=TensorRef,
    db=ctypes.c_void_p,
)


def _problem(case: Case) -> ctypes.Structure:
    axes = [
        Axis(size, out, kernel, stride, dilation, pad)
        for size, out, kernel, stride, dilation, pad in zip(
            case.input_size,
            case.output_size,
            case.kernel,
            case.stride,
            case.dilation,
            case.padding[::2],
        )
    ]
    return Problem(case.batch, case.c_in, case.c_out, case.groups, *axes)


# ---- calls --------------------------------------------------------------------------------------

_GAP = 512  # bytes around a tensor that belong to nobody, and its alignment


class Emulator:
    """A library that `build` made, loaded: the operations, and the machine's counters."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self._library = ctypes.CDLL(str(library))
        for name in ("text", "algorithms", "counts", "plan"):
            getattr(self._library, f"emulation_{name}").restype = ctypes.c_char_p
        self.seed(0)

    def seed(self, value: int) -> None:
        """Decides the order of blocks, warps and lanes."""
        self._library.emulation_seed(ctypes.c_uint64(value))

    def algorithms(self, op: str) -> list[str]:
        """What may be forced, best first: names, and "name:configuration"."""
        return self._library.emulation_algorithms(OPERATIONS.index(op)).decode().split()

    def set_device(
        self,
        processors: int = 132,
        capability: tuple[int, int] = (9, 0),
        shared_bytes: int = 227 << 10,
    ) -> None:
        """The device that configurations are chosen for; shared memory is what a block may have."""
        attributes = {16: processors, 75: capability[0], 76: capability[1], 97: shared_bytes}
        for which, value in attributes.items():
            self._library.emulation_set_attribute(which, value)

    def plan(
        self,
        op: str,
        case: Case,
        dtype: torch.dtype,
        algo: str = "auto",
        layout: str = "contiguous",
        allow_tf32: bool = False,
    ) -> list[dict[str, Any]]:
        """The launches of the operation, which are not run, so that the problem may be as large as
        it likes: {"kernel", "address", "blocks", "threads", "shared"} each; `address` is the
        function's, for `symbol`.

        Raises ValueError where the algorithm declines, KernelError where a launch is impossible."""

        def place(shape: Sequence[int], number: int) -> ctypes.Structure:
            n, c, h, w = shape
            last = (h * w * c, 1, w * c, c)
            strides = last if layout == "channels_last" else (c * h * w, h * w, w, 1)
            return TensorRef(number << 40, (_I64 * 4)(*strides))

        shapes = (case.x_shape, case.w_shape, case.y_shape)
        operands = [place(shape, i + 1) for i, shape in enumerate(shapes)]
        bias = 4 << 40 if op == "forward" else None
        params = Params(_problem(case), DTYPES.index(dtype), *operands, bias, 1)
        status, number = ctypes.c_int(), OPERATIONS.index(op)
        text = self._library.emulation_plan(
            number, ctypes.byref(params), algo.encode(), int(allow_tf32), ctypes.byref(status)
        )
        if status.value:
            self._check(status.value)
        return json.loads(text)

    @functools.cache  # noqa: B019  emulators live as long as the process
    def symbol(self, address: str) -> str:
        """The mangled name of the function at an address, as a plan tells it."""
        offset = hex(int(address, 16) - self._base())
        return toolchain.output("addr2line", "-f", "-e", str(self.path), offset).split()[0]

    @contextmanager
    def counting(self) -> Iterator[list[dict[str, Any]]]:
        """A list that holds, once the block has ended, of each launch in it: {"kernel", "blocks",
        "memory": {"read x": {"requests", "bytes", "sectors", "passes", "ideal"}, ...}, "conflicts":
        {place: the same}}. Sectors are the 32-byte sectors of each request, summed; passes over the
        banks of shared memory, and how few they could be."""
        launches: list[dict[str, Any]] = []
        self._library.emulation_count(1)
        try:
            yield launches
            launches += json.loads(self._library.emulation_counts())
        finally:
            self._library.emulation_count(0)
        for launch in launches:
            sites = launch["conflicts"].items()
            launch["conflicts"] = {self.locate(int(site, 16)): count for site, count in sites}

    def run(
        self,
        op: str,
        case: Case,
        t: Operands,
        algo: str = "auto",
        bias: bool = True,
        allow_tf32: bool = False,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> Tensor:
        """The operation; the result has the layout of its neighbour x, or of dy for grad_input.

        Raises ValueError where the algorithm declines the problem, and `KernelError`."""
        like = {"forward": t.x, "grad_input": t.dy, "grad_weight": t.w}[op]
        shape = {"forward": case.y_shape, "grad_input": case.x_shape, "grad_weight": case.w_shape}
        last = like.dim() == 4 and like.stride(1) == 1 and like.stride(3) != 1
        fmt = torch.channels_last if last else torch.contiguous_format
        empty = torch.empty(shape[op], dtype=t.w.dtype, memory_format=fmt)
        tensors = {"x": t.x, "w": t.w, "y": t.dy} | {"xyw"[(1, 0, 2)[OPERATIONS.index(op)]]: empty}
        written = {"forward": "y", "grad_input": "x", "grad_weight": "w"}[op]
        try:
            placed = {name: self._place(v, name, name == written) for name, v in tensors.items()}
            b = self._place(t.bias, "bias", False) if op == "forward" and bias else None
            params = Params(
                _problem(case),
                DTYPES.index(t.w.dtype),
                *(TensorRef(v.data_ptr(), (_I64 * 4)(*v.stride())) for v in placed.values()),
                b.data_ptr() if b is not None else None,
                b.stride(0) if b is not None else 0,
                ACTIVATIONS.index(activation),
                negative_slope,
            )
            self._check(
                self._library.emulation_run(
                    OPERATIONS.index(op), ctypes.byref(params), algo.encode(), int(allow_tf32)
                )
            )
        finally:
            self._library.emulation_remove_tensors()
        return placed[written]

    def grad_bias(self, dy: Tensor) -> Tensor:
        """The sum of dy [N, C, H, W] over all but the channels."""
        try:
            source = self._place(dy, "dy", False)
            result = self._place(torch.empty(dy.shape[1], dtype=dy.dtype), "db", True)
            n, c, h, w = dy.shape
            ref = TensorRef(source.data_ptr(), (_I64 * 4)(*source.stride()))
            dtype = DTYPES.index(dy.dtype)
            params = GradBiasParams(n, c, h, w, dtype, ref, result.data_ptr())
            self._check(self._library.emulation_grad_bias(ctypes.byref(params)))
        finally:
            self._library.emulation_remove_tensors()
        return result

    def locate(self, address: int) -> str:
        """File and line of an address in the library."""
        offset = hex(address - self._base() - 1)  # of the call, not of what follows it
        lines = toolchain.output("addr2line", "-i", "-s", "-e", str(self.path), offset).splitlines()
        places = [line.split()[0] for line in lines]
        kernel = [p for p in places if "runtime_api.h" not in p and "??" not in p]
        return " < ".join(kernel) or offset

    @functools.cache  # noqa: B019
    def _base(self) -> int:
        """Where the library begins in memory."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            if line.endswith(str(self.path)):
                return int(line.partition("-")[0], 16) - int(line.split()[2], 16)
        raise RuntimeError(f"{self.path} is not loaded")

    def _place(self, tensor: Tensor, name: str, written: bool) -> Tensor:
        """A copy of the same strides between gaps, made known to the machine."""
        size = tensor.itemsize
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride()))
        extent = 0 if tensor.numel() == 0 else extent * size
        memory = torch.full((extent + 3 * _GAP,), 255, dtype=torch.uint8)
        shift = tensor.data_ptr() % 16 if tensor.numel() else 0  # as (mis)aligned as the original
        begin = _GAP + (-memory.data_ptr()) % _GAP + shift
        flat = memory[begin : begin + extent].view(tensor.dtype)
        copy = flat.as_strided(tensor.shape, tensor.stride())
        if not written:
            copy.copy_(tensor)
        self._library.emulation_add_tensor(
            ctypes.c_void_p(flat.data_ptr()),
            ctypes.c_size_t(extent),
            int(written),
            name.encode(),
        )
        return copy

    def _check(self, status: int) -> None:
        text = self._library.emulation_text().decode()
        if status == 1:
            raise ValueError(text)
        if status:
            site = re.search(r"at (0x[0-9a-f]+)", text)
            raise KernelError(
                text.replace(site[1], self.locate(int(site[1], 16))) if site else text
            )


def define(op: str, case: Case, t: Operands) -> Tensor:
    """The operation by its definition, in float64."""
    x, w, bias, dy = (v.double().numpy() for v in t)
    if op == "forward":
        return torch.from_numpy(reference.forward(case, x, w, bias))
    if op == "grad_input":
        return torch.from_numpy(reference.grad_input(case, dy, w))
    return torch.from_numpy(reference.grad_weight(case, x, dy))


def bytes_written(launches: Iterable[dict[str, Any]], op: str) -> int:
    """Of the operation's result, as `Emulator.counting` counts."""
    name = {"forward": "write y", "grad_input": "write x", "grad_weight": "write w"}[op]
    return sum(launch["memory"].get(name, {"bytes": 0})["bytes"] for launch in launches)


def check(machine: Emulator, prefix: str = "", cases: Sequence[Case] = EDGE) -> int:
    """Runs the algorithms of that prefix, prints what comes of it; 1 if anything is wrong."""
    status = 0
    for op, (index, case) in itertools.product(OPERATIONS, enumerate(cases)):
        dtype = (torch.float32, torch.bfloat16)[index % 2]
        t = case.operands(1, dtype, exact=True)
        want = define(op, case, t).to(dtype)
        for algo in machine.algorithms(op):
            if not algo.startswith(prefix):
                continue
            try:
                right = torch.equal(machine.run(op, case, t, algo), want)
                outcome = "right" if right else "WRONG"
            except ValueError as error:
                right, outcome = True, str(error)
            except KernelError as error:
                right, outcome = False, f"MISTAKE: {error}"
            status |= not right
            print(op, algo, case, dtype, outcome, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(check(Emulator(build()), *sys.argv[1:2]))
