"""One binary for several instruction sets, and no instruction that the machine in use may lack."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deconv_ext.build
from deconv_ext.testing import EDGE, TINY
from support import OPERATIONS, C, assert_same_bits, cast, exact, run, use_isa

#: What x86-64 has from the beginning; more is in the namespaces deconv::cpu::{avx2,avx512} only.
NEEDS_AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(?:1[6-9]|2\d|3[01])\b")
NEEDS_AVX2 = re.compile(
    r"^v(?!er[rw]\b)\w+|^(?:andn|bextr|blsi|blsr|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx)\b"
)
NAMES = ("avx512", "avx2", "portable")


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
    for name, code in functions.items():
        least = needs(code)
        allowed = next((isa for isa in NAMES if f"cpu::{isa}::" in name), "portable")
        assert NAMES.index(least) >= NAMES.index(allowed), f"{name} needs {least}"
        found[least] += 1
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        assert min(found.values()) > 10, found


def test_the_patterns_know_the_instructions() -> None:
    assert needs(["vfmadd231ps %zmm1,%zmm2,%zmm3"]) == "avx512"
    assert needs(["vmovups (%rax),%xmm17"]) == "avx512"
    assert needs(["vmovups (%rax),%ymm1{%k1}"]) == "avx512"
    assert needs(["vmovups (%rax),%ymm3"]) == "avx2"
    assert needs(["shlx %rax,%rbx,%rcx"]) == "avx2"
    assert needs(["verr %ax", "movups (%rax),%xmm3", "call 1234 <f>", "ret"]) == "portable"


def test_the_machine_is_asked() -> None:
    """What is offered is what the processor has, best first; portable code is always there."""
    assert C.cpu_isas()[-1] == "portable" and C.cpu_isa() in C.cpu_isas()
    assert C.cpu_isas() == [name for name in NAMES if name in C.cpu_isas()]
    flags = Path("/proc/cpuinfo").read_text().split()
    assert ("avx2" in C.cpu_isas()) == ("avx2" in flags and "fma" in flags)
    wanted = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    assert ("avx512" in C.cpu_isas()) == (wanted <= set(flags))


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
