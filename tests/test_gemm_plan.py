"""The CUDA matrix kernels get the right tap tables and sensible tiles, whatever the GPU at hand.

The planner is plain C++, so a small program prints what it decides.
"""

from __future__ import annotations

import dataclasses
import random
import re
import subprocess
from pathlib import Path

import pytest

from deconv_ext import toolchain
from deconv_ext.testing import EDGE, LAYERS, Case, load_layers, make_case, random_case

HERE = Path(__file__).parent
PRODUCTS = ("mma16", "tf32", "fma32", "mma64")
OPERATIONS = ("forward", "grad_input", "grad_weight")
LAYOUTS = ("contiguous", "channels_last")
SHARED_BYTES = 227 * 1024  # of a thread block, sm_90


@dataclasses.dataclass(frozen=True)
class Query:
    op: str
    case: Case
    layout: str = "contiguous"
    product: str = "mma16"
    multiprocessors: int = 132

    def line(self) -> str:
        case = self.case
        axes = zip(
            case.input_size,
            case.output_size,
            case.kernel,
            case.stride,
            case.dilation,
            case.padding[::2],
        )
        numbers = [
            (*PRODUCTS, "wgmma").index(self.product),
            *(self.layout, self.multiprocessors),
            *(case.batch, case.c_in, case.c_out, case.groups),
            *(number for axis in axes for number in axis),
        ]
        return " ".join([self.op, *map(str, numbers)]) + "\n"


@dataclasses.dataclass(frozen=True)
class Answer:
    declined: str
    tile: str
    facts: dict[str, int]
    taps: dict[str, list[dict[str, int]]]  # of both axes


@pytest.fixture(scope="session")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("planner") / "planner"
    cuda = HERE.parent / "csrc/cuda"
    sources = [HERE / "gemm_plan_main.cpp", cuda / "gemm_plan.cpp", cuda / "wgmma_plan.cpp"]
    command = toolchain.cxx_compiler()[0].split()
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    subprocess.run([*command, *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def numbers(line: str) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"(\w+) (-?\d+)", line)}


def ask(planner: Path, queries: list[Query]) -> list[Answer]:
    text = "".join(query.line() for query in queries)
    done = subprocess.run([planner], input=text, capture_output=True, text=True, check=True)
    answers = []
    for block in done.stdout.split("end\n")[:-1]:
        first, *lines = block.splitlines()
        taps = {name: [numbers(line) for line in lines if line[0] == name] for name in "hw"}
        if first.startswith("declined "):
            answers.append(Answer(first.removeprefix("declined "), "", {}, taps))
        else:
            _, tile, facts = first.split(" ", 2)
            answers.append(Answer("", tile, numbers(facts), taps))
    assert len(answers) == len(queries)
    return answers


def plannable(case: Case) -> bool:
    return min(*case.output_size, case.batch) > 0 and max(*case.kernel, *case.stride) <= 64


def triples(case: Case, axis: int) -> list[tuple[int, int, int]]:
    """(input, kernel index, output) that meet, by the definition."""
    s, d, pad = case.stride[axis], case.dilation[axis], case.padding[2 * axis]
    out = case.output_size[axis]
    return sorted(
        (i, k, i * s + k * d - pad)
        for i in range(case.input_size[axis])
        for k in range(case.kernel[axis])
        if 0 <= i * s + k * d - pad < out
    )


def described(op: str, case: Case, axis: int, taps: list[dict[str, int]]) -> list:
    """The same, by the table of the axis."""
    s, size, out = case.stride[axis], case.input_size[axis], case.output_size[axis]
    found = []
    for tap in taps:
        if op == "forward":
            for o in range(tap["phase"], out, s):
                found.append((o // s + tap["offset"], tap["k"], o))
        else:
            for i in range(size):
                found.append((i, tap["k"], i * s + tap["offset"]))
    return sorted((i, k, o) for i, k, o in found if 0 <= i < size and 0 <= o < out)


@pytest.mark.parametrize("op", OPERATIONS)
def test_tables_hold_every_product_once(planner: Path, op: str, seed: int) -> None:
    cases = [*EDGE, *(random_case(seed + i) for i in range(100))]
    cases = [case for case in cases if plannable(case) and max(case.output_size) < 200]
    products = random.Random(seed).choices(("mma16", "fma32"), k=len(cases))
    queries = [
        Query(op, case, layout, product)
        for case, product in zip(cases, products)
        for layout in LAYOUTS
    ]
    for query, answer in zip(queries, ask(planner, queries)):
        assert not answer.declined, (query, answer)
        for axis, name in enumerate("hw"):
            want = triples(query.case, axis)
            assert described(op, query.case, axis, answer.taps[name]) == want, (query, name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_every_layer_has_a_tile(planner: Path, product: str, layout: str) -> None:
    """... that fits, and that suits the layout of the target and the stride."""
    layers = [case for case in load_layers("gpu") if plannable(case)]
    assert len(layers) > 30
    for op in OPERATIONS:
        queries = [Query(op, case, layout, product) for case in layers]
        for query, answer in zip(queries, ask(planner, queries)):
            case, tile = query.case, answer.tile
            assert 0 < answer.facts["blocks"] < 2**31, (query, answer)
            assert answer.facts["shared"] <= SHARED_BYTES, (query, answer)
            if op == "grad_weight":
                assert answer.facts["splits"] <= answer.facts["tiles"], (query, answer)
                continue
            target_channels = case.c_out if op == "forward" else case.c_in
            target_size = case.output_size if op == "forward" else case.input_size
            if layout == "channels_last" and target_channels > 1 and max(target_size) > 1:
                assert tile.endswith("_last"), (query, answer)
            elif layout == "contiguous" and op == "forward" and case.stride[1] == 2:
                assert tile.endswith("x2"), (query, answer)
            elif op == "grad_input":
                assert tile.count("x") == 1, (query, answer)


def test_large_layers_get_large_tiles_and_small_ones_small(planner: Path) -> None:
    layers = {case.name: case for case in load_layers("gpu")}
    want = {
        ("forward", "unet_128_64", "contiguous"): "64x128x2",
        ("forward", "unet_1024_512", "channels_last"): "128x128_last",
        ("forward", "pix2pix_1024_512", "contiguous"): "32x64x2",
        ("forward", "depthanything_4x4", "contiguous"): "64x64x4",
        ("grad_input", "stylegan_per_sample", "contiguous"): "128x128",
        ("grad_input", "tiny", "contiguous"): "64x64",
        ("grad_weight", "dcgan_256_128", "contiguous"): "64x32x16",
        ("grad_weight", "unet_256_128", "contiguous"): "64x64x4",
        ("grad_weight", "tiny", "contiguous"): "32x32x4",
    }
    queries = [Query(op, layers[name], layout) for op, name, layout in want]
    assert [answer.tile for answer in ask(planner, queries)] == [*want.values()]


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_order_of_summation_is_that_of_one_image(planner: Path, layout: str, product: str) -> None:
    """A sample's result may not depend on the batch, nor on the GPU that picks the tile."""
    problems = [(op, case) for case in LAYERS if plannable(case) for op in OPERATIONS[:2]]
    settings = [(batch, sms) for batch in (1, 2, 37) for sms in (1, 132)]
    queries = [
        Query(op, dataclasses.replace(case, batch=batch), layout, product, sms)
        for op, case in problems
        for batch, sms in settings
    ]
    answers = ask(planner, queries)
    tiles = set()
    for index, problem in enumerate(problems):
        same = answers[index * len(settings) :][: len(settings)]
        orders = [(answer.facts["chunk"], answer.facts["splits"], answer.taps) for answer in same]
        assert all(order == orders[0] for order in orders), problem
        tiles.add(len({answer.tile for answer in same}))
    assert (max(tiles) > 1) == (product != "mma64")  # though the tile does depend on them


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPERATIONS[:2])
def test_wgmma_has_a_tile_for_every_layer(planner: Path, op: str, layout: str) -> None:
    """... with two buffers of each kind at least, and whether it is taken, its tile and its order
    of summation depend neither on the batch nor on the GPU."""
    layers = [case for case in load_layers("gpu") if plannable(case)]
    settings = [(batch, sms) for batch in (1, 64) for sms in (2, 132)]
    queries = [
        Query(op, dataclasses.replace(case, batch=batch), layout, "wgmma", sms)
        for case in layers
        for batch, sms in settings
    ]
    answers = ask(planner, queries)
    for index, case in enumerate(layers):
        same = answers[index * len(settings) :][: len(settings)]
        for answer, (_, sms) in zip(same, settings):
            assert not answer.declined, case
            assert min(answer.facts["stages"], answer.facts["buffers"]) >= 2, (case, answer)
            assert answer.facts["shared"] <= SHARED_BYTES, (case, answer)
            assert answer.facts["blocks"] == min(sms, answer.facts["tiles"]), (case, answer)
        first = same[0]
        for answer in same:
            assert (answer.tile, answer.taps) == (first.tile, first.taps), case
            for fact in ("preferred", "chunk"):
                assert answer.facts[fact] == first.facts[fact], case
        target = case.c_out if op == "forward" else case.c_in
        size = case.output_size if op == "forward" else case.input_size
        if target > 1 and max(size) > 1:
            assert first.tile.endswith("_last") == (layout == "channels_last"), (case, first)
    preferred = (answer.facts["preferred"] for answer in answers[:: len(settings)])
    taken = {case.name for case, taken in zip(layers, preferred) if taken}
    assert {"unet_1024_512", "cyclegan_256_128"} <= taken and "dla_dw_64" not in taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wgmma_has_a_tile_for_every_grad_weight(planner: Path, layout: str) -> None:
    """... with two stages at least, all multiprocessors at work, and every tap once."""
    layers = [case for case in load_layers("gpu") if plannable(case)]
    answers = ask(planner, [Query("grad_weight", case, layout, "wgmma") for case in layers])
    for case, answer in zip(layers, answers):
        assert not answer.declined, case
        assert answer.facts["stages"] >= 2 and answer.facts["shared"] <= SHARED_BYTES, case
        for axis, name in enumerate("hw"):
            found = described("grad_weight", case, axis, answer.taps[name])
            assert found == triples(case, axis), (case, name)
        rounds = -(-answer.facts["blocks"] // 132)
        if answer.facts["tiles"] >= 512:
            assert answer.facts["blocks"] >= 0.75 * 132 * rounds, (case, answer)
    taken = {case.name for case, answer in zip(layers, answers) if answer.facts["preferred"]}
    assert ({"unet_1024_512", "pillars_4x4"} <= taken) == (layout == "channels_last")


def test_what_is_declined_is_said(planner: Path) -> None:
    queries = [
        Query("forward", make_case("kernel", (1, 3, 9, 9), 4, 65, 1)),
        Query("grad_input", make_case("stride", (1, 3, 9, 9), 4, 3, 65)),
        Query("forward", make_case("dilation", (1, 3, 9, 9), 4, 3, 1, dilation=3000)),
    ]
    reasons = [answer.declined for answer in ask(planner, queries)]
    assert ["at most 64" in reason for reason in reasons] == [True, True, False]
    assert "at most 8192" in reasons[2]
