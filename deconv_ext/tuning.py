"""`autotune`: times the algorithms that can take a call, once a shape, and remembers the fastest.

    with deconv_ext.autotune():  # nothing is timed anywhere else
        model(x).square().mean().backward()

    deconv_ext.tuning.load()  # in another process: the same choices without timing

A choice holds for calls with the same device (for a CPU: its instruction set and number of threads
too), dtype, operation, sizes, arguments and strides, whoever makes them: functions, modules,
autograd, operators of torch.compile. Results stay deterministic, but each choice has an order of
summation of its own: a sample's result may then depend on the batch size, and on the machine that
the file was made on.

The file is JSON, a list of entries that can be read and edited; `DECONV_EXT_LOG=config` prints each
choice as it is used. An entry that names an algorithm that does not exist, or that declines the
call, is ignored with one warning.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .build import extension
from .compiler import cache_dirs
from .testing import Case, Operands

if TYPE_CHECKING:  # the benchmark's parts are imported when they are needed
    from .bench_timing import EventTimer, GatedTimer

Entry = dict[str, Any]
Call = tuple[int, ...]  # as csrc/choices.h puts it down

_OPERATIONS = ("forward", "grad_input", "grad_weight")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64")
_SIZES = ("batch", "c_in", "c_out", "groups")
_AXIS = ("in", "out", "kernel", "stride", "dilation", "pad")
#: The definition itself, far slower than the rest: chosen only where nothing else takes a call.
_LAST_RESORTS = ("reference", "generic")
#: Who is this many times slower than the fastest in a first trial is not timed further.
_HOPELESS = 4.0
#: Another algorithm is chosen if it takes less than this share of the default's time.
_GAIN = 0.97

_choices: dict[Call, str] = {}
_open = False  # a block of `autotune`


def default_path() -> Path:
    """``tuning.json`` in the first of `DECONV_EXT_CACHE`, `TORCH_EXTENSIONS_DIR`/deconv_ext,
    `XDG_CACHE_HOME`/deconv_ext and ~/.cache/deconv_ext."""
    return cache_dirs()[0] / "tuning.json"


@contextmanager
def autotune(
    path: str | os.PathLike[str] | None = None, *, seconds: float = 0.1
) -> Iterator[list[Entry]]:
    """Tune every kind of call that happens inside the block; when it ends, time, use and save.

    Calls inside the block run as usual and are only put down. At its end each kind that is not in
    the file yet is timed on random numbers, with every algorithm (on CUDA, every configuration)
    that takes it. Later calls use the fastest. Needs memory for the operands of one call at a time.

    Args:
        path: the JSON file, read first if it exists and extended afterwards; `default_path()` if
            None. Entries of other machines stay as they are.
        seconds: time to spend on each algorithm that is worth it, for each kind of call.

    Yields:
        A list, which holds the new entries once the block has ended: dicts of the call, ``algo``,
        the fastest, and ``us``, the median microseconds of each that was timed.

    Raises:
        ValueError: the file exists and is not one of these.
        RuntimeError: the block lies in another one.
    """
    global _open
    if _open:
        raise RuntimeError("a block of autotune cannot lie in another one")
    file = default_path() if path is None else Path(path)
    kernels = extension()
    known = {_key(entry) for entry in load(file) if _exists(entry)} if file.exists() else set()
    kernels.record_calls(True)
    new: list[Entry] = []
    _open = True
    try:
        yield new
    finally:
        _open = False
        calls = kernels.record_calls(False)
    timers: dict[int, GatedTimer | EventTimer] = {}
    for call in calls:
        entry, place = _entry(call), call[2]
        if _key(entry) in known or 0 in (entry["batch"], entry["c_in"]):
            continue
        if place not in timers:
            timers[place] = _timer(torch.device("cuda", place) if place >= 0 else "cpu", seconds)
        _tune(entry, timers[place])
        known.add(_key(entry))
        new.append(entry)
    if new:
        others = _read(file) if file.exists() else []
        mine = {_key(entry) for entry in new}
        _write(file, [*(entry for entry in others if _key(entry) not in mine), *new])
        _use(new)


def load(path: str | os.PathLike[str] | None = None) -> list[Entry]:
    """Use the choices that a file holds for the devices of this machine, besides those in use.

    Args:
        path: what `autotune` has written; `default_path()` if None.

    Returns:
        The entries that are for this machine; see `autotune`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not one of these.
    """
    entries = _read(default_path() if path is None else Path(path))
    return _use(entries)


def clear() -> None:
    """Forget all choices: calls are as if nothing had been tuned. Files stay."""
    _choices.clear()
    extension().set_choices({})


# --- entries and calls ---------------------------------------------------------------------------


def _names() -> dict[int, str]:
    """The device of each index, -1 being the CPU, as entries name it."""
    from .bench_machine import device_name

    names = {-1: f"{device_name(torch.device('cpu'))}, {extension().cpu_isa()}"}
    if torch.cuda.is_available():
        names |= {i: torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return names


def _entry(call: Sequence[int]) -> Entry:
    """The call in words."""
    numbers = iter(call)
    op, dtype, place, threads, tf32 = (next(numbers) for _ in range(5))
    entry: Entry = {"op": _OPERATIONS[op], "dtype": _DTYPES[dtype]}
    entry |= {"device": _names()[place], "threads": threads, "tf32": bool(tf32)}
    entry |= {name: next(numbers) for name in _SIZES}
    axes = [[next(numbers) for _ in _AXIS] for _ in "hw"]
    entry |= {name: list(pair) for name, pair in zip(_AXIS, zip(*axes))}
    entry["strides"] = {name: [next(numbers) for _ in range(4)] for name in "xwy"}
    return entry


def _call(entry: Mapping[str, Any], place: int) -> Call:
    """The inverse of `_entry`; `place` is the index of the device."""
    return (
        _OPERATIONS.index(entry["op"]),
        _DTYPES.index(entry["dtype"]),
        place,
        entry["threads"],
        int(entry["tf32"]),
        *(entry[name] for name in _SIZES),
        *(entry[name][axis] for axis in (0, 1) for name in _AXIS),
        *(stride for name in "xwy" for stride in entry["strides"][name]),
    )


def _key(entry: Mapping[str, Any]) -> tuple[str, Call]:
    return entry["device"], _call(entry, 0)


def _exists(entry: Mapping[str, Any]) -> bool:
    """Whether this version has the algorithm."""
    device = "cpu" if entry["threads"] else "cuda"
    return entry["algo"] in ("auto", *extension().list_algorithms(entry["op"], device))


def _use(entries: list[Entry]) -> list[Entry]:
    names = _names()
    here = [entry for entry in entries if entry["device"] in names.values()]
    for entry in here:
        for place, name in names.items():
            if name == entry["device"]:
                _choices[_call(entry, place)] = entry["algo"]
    extension().set_choices({call: algo for call, algo in _choices.items() if algo != "auto"})
    return here


# --- timing --------------------------------------------------------------------------------------


def _timer(device: torch.device | str, seconds: float) -> GatedTimer | EventTimer:
    from .bench_timing import EventTimer, GatedTimer

    device = torch.device(device)
    if device.type == "cuda":
        return EventTimer(device, 100, seconds)
    return GatedTimer(device, 9, seconds)


def _case(entry: Mapping[str, Any]) -> Case:
    """The problem; of padding at the end and output_padding, one is zero."""
    beyond = [
        out - ((size - 1) * s - pad + d * (k - 1) + 1)
        for size, out, k, s, d, pad in zip(*(entry[name] for name in _AXIS))
    ]
    top, left = entry["pad"]
    return Case(
        name="tuned",
        batch=entry["batch"],
        c_in=entry["c_in"],
        c_out=entry["c_out"],
        h=entry["in"][0],
        w=entry["in"][1],
        kernel=tuple(entry["kernel"]),
        stride=tuple(entry["stride"]),
        padding=(top, max(-beyond[0], 0), left, max(-beyond[1], 0)),
        output_padding=(max(beyond[0], 0), max(beyond[1], 0)),
        dilation=tuple(entry["dilation"]),
        groups=entry["groups"],
    )


def _operands(entry: Mapping[str, Any], case: Case, device: torch.device, seed: int) -> Operands:
    """Random numbers of the call's strides, even where elements share memory."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, entry["dtype"])

    def fill(shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        source = torch.randn(max(extent, 1), generator=generator, device=device)
        return source.to(dtype).as_strided(shape, strides)

    strides = entry["strides"]
    x, w = fill(case.x_shape, strides["x"]), fill(case.w_shape, strides["w"])
    return Operands(x, w, fill([case.c_out], [1]), fill(case.y_shape, strides["y"]))


def _tune(entry: Entry, timer: GatedTimer | EventTimer) -> None:
    """Add `algo` and `us`."""
    from .bench_contenders import product

    op, case = entry["op"], _case(entry)
    names = [
        name
        for name in extension().list_algorithms(op, timer.device.type)
        if name not in _LAST_RESORTS
    ]
    t = _operands(entry, case, timer.device, 0)
    first: dict[str, float] = {}
    for name in ("auto", *names):
        function = product(case, op, t, name)
        try:
            function()
        except RuntimeError as error:
            if "cannot take this problem" in str(error):
                continue
            raise
        first[name] = timer.sample(function, 1)
    entry["algo"], entry["us"] = "auto", {}
    if len(first) == 1:  # integers have the definition alone
        return
    limit = _HOPELESS * min(first.values())
    worth = [name for name, time in first.items() if time <= limit or name == "auto"]

    def make(copy: int) -> dict[str, Any]:
        t = _operands(entry, case, timer.device, copy)
        return {name: product(case, op, t, name) for name in worth}

    us = {name: round(timing.us, 3) for name, timing in timer.compare(make).items()}
    best = min(us, key=lambda name: us[name])
    entry["us"] = us
    if us[best] < _GAIN * us["auto"]:
        entry["algo"] = best


# --- the file ------------------------------------------------------------------------------------


def _read(path: Path) -> list[Entry]:
    try:
        entries: list[Entry] = json.loads(path.read_text())
        if not isinstance(entries, list):
            raise TypeError("not a list")
        for entry in entries:
            _key(entry)
            if not isinstance(entry["algo"], str):
                raise TypeError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"path must be a file that deconv_ext.autotune has written, but {path} is not: "
            f"{type(error).__name__}: {error}"
        ) from None
    return entries


def _write(path: Path, entries: list[Entry]) -> None:
    """An entry a line; whoever reads at the same time sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
