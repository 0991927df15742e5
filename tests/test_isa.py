"""One binary for several instruction sets, and no instruction that the machine in use may lack."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deconv_ext.build
from deconv_ext.testing import EDGE, TINY, make_case, relayout
from support import OPERATIONS, C, assert_equal, assert_same_bits, cast, exact, run, use_isa

#: What x86-64 has from the beginning; more is in the namespaces deconv::cpu::{avx2,avx512} only,
#: and there, in functions that are named after them, what multiplies pairs.
NEEDS_PAIRS = {
    "amx": re.compile(r"^(?:tile|tdp|ldtilecfg|sttilecfg)"),
    "dot": re.compile(r"^(?:vdpbf16ps|vcvtneps2bf16)"),
}
NEEDS_AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])\b")
NEEDS_AVX2 = re.compile(
    r"^v(?!er[rw]\b)\w+|^(?:andn|bextr|blsi|blsr|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)\b"
)
NAMES = ("avx512", "avx2", "portable")
BITS_OF_A_DENORMAL = 0x40  # of a bfloat16: 2^-127


def instructions() -> dict[str, list[str]]:
    """Demangled function -> its instructions, of the whole binary."""
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", "-w", C.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    functions: dict[str, list[str]] = {}
    for line in listing.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            current = functions.setdefault(head[1], [])
        elif "\t" in line:
            current.append(line.split("\t", 1)[1].strip())
    return functions


def needs(code: list[str]) -> str:
    """The least instruction set for some instructions."""
    if any(NEEDS_AVX512.search(line) for line in code):
        return "avx512"
    return "avx2" if any(NEEDS_AVX2.search(line) for line in code) else "portable"


def test_vector_instructions_stay_in_their_namespace() -> None:
    """A shared inline function compiled for AVX-512 and kept by the linker would be found here."""
    functions = instructions()
    assert any("PyInit" in name for name in functions), "no symbols: nothing was looked at"
    found = {name: 0 for name in NAMES}
    with_pairs = dict.fromkeys(NEEDS_PAIRS, 0)
    for name, code in functions.items():
        least = needs(code)
        allowed = next((isa for isa in NAMES if f"cpu::{isa}::" in name), "portable")
        assert NAMES.index(least) >= NAMES.index(allowed), f"{name} needs {least}"
        found[least] += 1
        for what, pattern in NEEDS_PAIRS.items():
            found_there = any(pattern.search(line) for line in code)
            assert not found_there or what in name.lower(), f"{name} needs {what}"
            with_pairs[what] += found_there
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert min(found.values()) > 10, found
        assert min(with_pairs.values()) > 2, with_pairs


def test_the_patterns_know_the_instructions() -> None:
    assert needs(["vfmadd231ps %zmm1,%zmm2,%zmm3"]) == "avx512"
    assert needs(["vmovups (%rax),%xmm17"]) == "avx512"
    assert needs(["vmovups (%rax),%ymm1{%k1}"]) == "avx512"
    assert needs(["vmovups (%rax),%ymm3"]) == "avx2"
    assert needs(["shlx %rax,%rbx,%rcx"]) == "avx2"
    for line in ("tdpbf16ps %tmm1,%tmm2,%tmm3", "tilerelease"):
        assert NEEDS_PAIRS["amx"].search(line) and not NEEDS_PAIRS["dot"].search(line)
    assert NEEDS_PAIRS["dot"].search("vdpbf16ps %zmm1,%zmm2,%zmm3")
    assert needs(["verr %ax", "movups (%rax),%xmm3", "call 1234 <f>", "ret"]) == "portable"


def test_the_machine_is_asked() -> None:
    """What is offered is what the processor has, best first; portable code is always there."""
    assert C.cpu_isas()[-1] == "portable" and C.cpu_isa() in C.cpu_isas()
    names = ("amx", "avx512_bf16", *NAMES)
    assert C.cpu_isas() == [name for name in names if name in C.cpu_isas()]
    flags = Path("/proc/cpuinfo").read_text().split()
    assert ("avx2" in C.cpu_isas()) == ("avx2" in flags and "fma" in flags)
    wanted = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert ("avx512" in C.cpu_isas()) == (wanted <= set(flags))
    assert ("avx512_bf16" in C.cpu_isas()) == (wanted | {"avx512_bf16"} <= set(flags))
    assert ("amx" in C.cpu_isas()) == (wanted | {"amx_tile", "amx_bf16"} <= set(flags))


@pytest.mark.parametrize("isa", C.cpu_isas())
def test_pairs_are_multiplied_where_that_is_faster(isa: str) -> None:
    """Their instructions alone take denormal operands for zero: so one can see who computed."""
    # Of how many channels that are summed; of how many rows of grad_weight's tiles.
    channels_taken = {"amx": {64}, "avx512_bf16": {64, 62}}.get(isa, set())
    taps_taken = {63} if isa == "avx512_bf16" else set()
    outputs_taken = {"amx": {5}, "avx512_bf16": {2, 3, 5}}.get(isa, set())
    for channels in (64, 62, 63):
        case = make_case("denormal", (1, channels, 5, 6), channels, 3, 2, 1, 1)
        t = case.operands(0, torch.bfloat16)
        for tensor in (t.x, t.dy):
            tensor.view(torch.int16).fill_(BITS_OF_A_DENORMAL)
        t.w.fill_(1024)
        t.bias.zero_()
        with use_isa(isa):
            for op in ("forward", "grad_input"):
                flushed = not run(op, case, t).any()
                taken = channels_taken | (taps_taken if op == "grad_input" else set())
                assert flushed == (channels in taken), (op, channels)
            for outputs in (2, 3, 5):
                case = make_case("outputs", (1, channels, 5, 6), outputs, 3, 2, 1, 1)
                t = t._replace(dy=t.dy.new_full((1, outputs, *t.dy.shape[2:]), 1024))
                flushed = not run("grad_weight", case, t).any()
                assert flushed == (outputs in outputs_taken), outputs


@pytest.mark.parametrize("isa", C.cpu_isas())
def test_bfloat16_of_any_strides(isa: str) -> None:
    """Pairs of channels that lie apart, next to each other, or so at an address that is odd."""
    case = make_case("strides", (3, 64, 6, 21), 96, 4, 2, 1, 0, 1, 2)
    operands, results = exact(case, False)
    plain = cast(operands, torch.bfloat16)
    with use_isa(isa):
        for x, w, dy in itertools.product(("contiguous", "channels_last", "sliced"), repeat=3):
            t = plain._replace(
                x=relayout(plain.x, x), w=relayout(plain.w, w), dy=relayout(plain.dy, dy)
            )
            for op in OPERATIONS:
                assert_equal(run(op, case, t), results[op].to(torch.bfloat16), (op, x, w, dy))
        last = cast(operands, torch.bfloat16, "channels_last")
        odd = last._replace(x=at_odd_address(last.x), w=at_odd_address(last.w))
        assert_equal(run("forward", case, odd), results["forward"].to(torch.bfloat16), "odd")


@pytest.mark.parametrize("isa", C.cpu_isas())
def test_bfloat16_of_odd_channels(isa: str) -> None:
    """Taps in pairs, of which the padding or the end of the kernel may have one."""
    shapes = (
        ((2, 3, 9, 11), 5, 4, 2, 1, 0, 1, 1),
        ((1, 21, 5, 7), 3, 9, 2, 4, 1, 1, 1),
        ((3, 1, 6, 40), 1, 2, 2, 0, 0, 1, 1),
        ((2, 63, 4, 5), 7, 3, 1, 1, 0, 1, 1),
        ((17, 9, 2, 3), 15, 5, 3, 2, 1, 1, 3),
        ((1, 5, 7, 18), 17, 4, 1, 3, 0, 2, 1),
        ((2, 3, 8, 33), 64, 6, 3, 1, 2, 1, 1),
    )
    for shape, outputs, *geometry in shapes:
        case = make_case("odd", shape, outputs, *geometry)
        operands, results = exact(case, False)
        plain = cast(operands, torch.bfloat16)
        for x, w, dy in itertools.product(("contiguous", "channels_last", "sliced"), repeat=3):
            t = plain._replace(
                x=relayout(plain.x, x), w=relayout(plain.w, w), dy=relayout(plain.dy, dy)
            )
            with use_isa(isa):
                for op in ("forward", "grad_input"):
                    got = run(op, case, t, "gemm")
                    assert_equal(got, results[op].to(torch.bfloat16), (op, case, x, w, dy))


@pytest.mark.parametrize("isa", C.cpu_isas())
def test_where_a_sum_is_rounded_does_not_show(isa: str) -> None:
    """Inside an image in registers, at its edges by way of memory: denormals come out the same."""
    case = make_case("rounded", (1, 4, 19, 37), 64, 4, 2, 1, 0)
    t = case.operands(0, torch.bfloat16, "channels_last")
    t.x.zero_()
    for value in (BITS_OF_A_DENORMAL, 0x7FC1, 0x3F80):  # NaN, one
        t.bias.view(torch.int16).fill_(value)
        with use_isa(isa):
            y = run("forward", case, t, "gemm").view(torch.int16)
        assert (y == y[0, 0, 0, 0]).all(), (value, y.unique())


@pytest.mark.parametrize("isa", C.cpu_isas())
def test_lines_of_a_few_pixels(isa: str) -> None:
    """Half squares are transposed two at a time, and few channels fill half of a vector."""
    for channels, outputs, width in itertools.product((3, 8, 33), (5, 40, 70), (1, 4, 7, 9, 15)):
        case = make_case("short", (2, channels, 3, width), outputs, 4, 2, 1)
        operands, results = exact(case, False)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                t = cast(operands, dtype, layout)
                with use_isa(isa):
                    for op in OPERATIONS:
                        got = run(op, case, t, "gemm")
                        assert_equal(got, results[op].to(dtype), (op, case, dtype, layout))


def at_odd_address(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, from the second element of its memory on."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def in_a_process(isa: str) -> subprocess.CompletedProcess:
    code = "from deconv_ext.build import extension; print(extension().cpu_isa())"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DECONV_EXT_CPU_ISA": isa},
        cwd=Path(deconv_ext.build.__file__).parents[1],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", C.cpu_isas())
def test_the_environment_chooses(isa: str) -> None:
    done = in_a_process(isa)
    assert done.stdout.split()[-1:] == [isa], done


def test_the_environment_is_checked() -> None:
    done = in_a_process("sse9")
    assert done.returncode != 0
    assert (
        "DECONV_EXT_CPU_ISA must name an instruction set" in done.stderr and "'sse9'" in done.stderr
    )


def test_switching() -> None:
    for isa in C.cpu_isas():
        with use_isa(isa):
            assert C.cpu_isa() == isa


@pytest.mark.parametrize("op", OPERATIONS)
def test_instruction_sets_agree(op: str) -> None:
    """To the bit where sums are exact, and to rounding on other numbers."""
    for case in (*EDGE, *TINY[::3]):
        t = cast(exact(case, False)[0], torch.float32)
        rough = case.operands(1)
        results, roughs = [], []
        for isa in C.cpu_isas():
            with use_isa(isa):
                results.append(run(op, case, t))
                roughs.append(run(op, case, rough))
        for result, other in zip(results, roughs):
            assert_same_bits(result + 0.0, results[0] + 0.0, case)
            torch.testing.assert_close(other, roughs[0], rtol=1e-4, atol=1e-4)
