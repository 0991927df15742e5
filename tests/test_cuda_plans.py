"""Which kernel, configuration and launch every layer of layers.csv gets, at its full size.

The code that decides runs as it is (cuda_on_cpu/ puts the launches down instead of running them).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from typing import NamedTuple

import pytest
import torch

from deconv_ext.testing import Case, load_layers
from emulator import OPERATIONS, Emulator, build, dtype_of

MACHINE = Emulator(build())
LAYERS = load_layers("gpu")
FORMATS = ("bfloat16", "float16", "tf32", "float32", "float64")
LAYOUTS = ("contiguous", "channels_last")
GPUS = {  # multiprocessors, capability, shared memory of a block
    "A100": (108, (8, 0), 163 << 10),
    "H200": (132, (9, 0), 227 << 10),
}


class Call(NamedTuple):
    op: str
    case: Case
    fmt: str
    layout: str

    def plan(self, algo: str = "auto") -> list[dict]:
        dtype, tf32 = dtype_of(self.fmt), self.fmt == "tf32"
        return MACHINE.plan(self.op, self.case, dtype, algo, self.layout, tf32)


def calls(op: str) -> list[Call]:
    return [Call(op, *rest) for rest in itertools.product(LAYERS, FORMATS, LAYOUTS)]


def logged(capfd: pytest.CaptureFixture[str]) -> list[list[str]]:
    """[operation, algorithm:configuration] of each call since, by DECONV_EXT_LOG=config."""
    lines = capfd.readouterr().err.splitlines()
    return [line.split()[1:3] for line in lines if line.startswith("deconv_ext: ")]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DECONV_EXT_LOG", "config")
    yield
    MACHINE.set_device()


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("op", OPERATIONS)
def test_every_layer_has_a_legal_configuration(
    op: str, gpu: str, capfd: pytest.CaptureFixture[str]
) -> None:
    MACHINE.set_device(*GPUS[gpu])
    every = calls(op)
    plans = [call.plan() for call in every]
    log = logged(capfd)
    names = set(MACHINE.algorithms(op))
    assert len(log) == len(every)
    for call, launches, (logged_op, algo) in zip(every, plans, log):
        assert logged_op == op and algo in names, (call, algo)
        assert algo != "generic", call  # which is for integers and for what no layer has
        assert 1 <= len(launches) <= 3, (call, launches)
        for launch in launches:
            assert 0 < launch["blocks"] < 2**31 and 32 <= launch["threads"] <= 1024, (call, launch)
            assert launch["shared"] <= GPUS[gpu][2], (call, launch)
        if call.case.kind in ("depthwise", "few outputs") and op != "grad_weight":
            assert algo.startswith("direct:"), call
        if call.case.kind in ("overlapping", "kernel = stride"):
            assert not algo.startswith("direct"), call


CHOICES = {  # (operation, layer, format, layout) -> configuration of the direct kernels
    ("forward", "dla_dw_64", "bfloat16", "contiguous"): "one_channel",
    ("forward", "dla_dw_64", "bfloat16", "channels_last"): "four_pairs",
    ("grad_input", "dla_dw_64", "float32", "channels_last"): "four_pairs",
    ("forward", "dla_dw_8x8_s4", "bfloat16", "contiguous"): "one_channel",
    ("forward", "dla_dw_64", "float64", "channels_last"): "any_four_pairs",
    ("forward", "dla_dw_64", "float64", "contiguous"): "any_one_channel",
    ("forward", "dcgan_64_3", "bfloat16", "contiguous"): "four_targets",
    ("forward", "dcgan_64_3", "bfloat16", "channels_last"): "four_by_four",
    ("grad_input", "dcgan_64_3", "float32", "channels_last"): "four_targets",
    ("forward", "dbnet_64_1", "float16", "channels_last"): "four_sources",
    ("forward", "dbnet_64_1", "float16", "contiguous"): "one_channel",
    ("forward", "fsrcnn_x2", "bfloat16", "contiguous"): "one_channel",
    ("forward", "fcn32s", "bfloat16", "contiguous"): "any_four_targets",
}


def test_direct_layers_get_what_holds_together_what_lies_together(
    capfd: pytest.CaptureFixture[str],
) -> None:
    layers = {case.name: case for case in LAYERS}
    for op, name, fmt, layout in CHOICES:
        Call(op, layers[name], fmt, layout).plan()
    assert [algo for _, algo in logged(capfd)] == [f"direct:{name}" for name in CHOICES.values()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_long_sums_of_small_images_are_split(
    layout: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """64 x 64 taps of 21 channels meet in one input pixel, and there are few pixels."""
    (layer,) = (case for case in LAYERS if case.name == "fcn32s")
    for fmt in FORMATS:
        for case in (layer, dataclasses.replace(layer, batch=1)):
            _, share, combine = Call("grad_input", case, fmt, layout).plan()
            assert share["blocks"] % combine["blocks"] == 0 and combine["shared"] == 0
            # Of one image, for its result must not depend on the others.
            splits = share["blocks"] // combine["blocks"]
            assert 4 <= splits <= 8, (fmt, splits)
            assert share["blocks"] >= 100 * case.batch / 8, (case, fmt)
    assert {algo.partition(":")[0] for _, algo in logged(capfd)} == {"gemm"}


# ---- forced configurations ----------------------------------------------------------------------

COLUMNS = {(2, 2, 0), (3, 2, 1), (4, 2, 1), (8, 4, 2), (16, 8, 4), (9, 2, 4), (9, 3, 4)}


def sources(call: Call) -> int:
    case = call.case
    return (case.c_in if call.op == "forward" else case.c_out) // case.groups


def row_bytes(call: Call) -> int:
    """At most, of four channels of the target."""
    case, phases = call.case, call.case.stride[0] if call.op == "forward" else 1
    slots, taps = case.kernel[1] + case.stride[1] + 1, -(-case.kernel[0] // phases)
    return 4 * (8 if call.fmt == "float64" else 4) * sources(call) * taps * slots


def depthwise(call: Call) -> bool:
    return call.case.c_in == call.case.c_out == call.case.groups


# Why an algorithm may decline, and when that is so.
CONDITIONS = {
    "it needs one channel a group": lambda call: not depthwise(call),
    "it needs a multiple of four source channels a group": lambda call: sources(call) % 4,
    "float64 has no unrolled patterns": lambda call: call.fmt == "float64",
    # some are compiled for one channel alone
    "its columns are none of the unrolled patterns": lambda call: call.fmt != "float64",
    "it needs the weights of a target row in 96 KiB": lambda call: row_bytes(call) > 96 << 10,
    r"it needs at most 2\^22 weights": lambda call: torch.Size(call.case.w_shape).numel() > 2**22,
    # compiled for a type are the tiles that suit it
    "the tile '.*' is not one of": lambda call: call.fmt in ("float32", "float64"),
    "it has no such tile for this type, or shared memory does not hold it": lambda call: True,
    "it has no such tile, or shared memory does not hold it": lambda call: True,
    "only float16 and bfloat16 have wgmma kernels": lambda call: "16" not in call.fmt,
}


def unrolled(call: Call) -> bool:
    case = call.case
    return call.fmt != "float64" and (case.kernel[1], case.stride[1], case.padding[2]) in COLUMNS


@pytest.mark.parametrize("op", OPERATIONS)
def test_a_forced_configuration_is_taken_or_the_condition_that_fails_is_named(
    op: str, capfd: pytest.CaptureFixture[str]
) -> None:
    taken: Counter[str] = Counter()
    wanted = []
    for algo in MACHINE.algorithms(op):
        for call in calls(op):
            try:
                call.plan(algo)
            except ValueError as declined:
                found = re.fullmatch(r"algo='(.*)' cannot take this problem: (.*)", str(declined))
                assert found and found[1] == algo, (call, declined)
                conditions = [true for why, true in CONDITIONS.items() if re.match(why, found[2])]
                assert len(conditions) == 1 and conditions[0](call), (call, declined)
                assert algo != "generic", call
                if algo == "direct:one_channel" and unrolled(call):
                    assert "96 KiB" in found[2], (call, declined)
            else:
                taken[algo] += 1
                wanted.append([op, algo])
    for (logged_op, used), (_, algo) in zip(logged(capfd), wanted, strict=True):
        assert logged_op == op and (used == algo if ":" in algo else used.startswith(algo))
    assert taken["generic"] == len(calls(op)) > 300
    # Pairs of any taps are only for what no layer has unrolled patterns for.
    there = set(MACHINE.algorithms(op))
    assert set(taken) == there, there - set(taken)
