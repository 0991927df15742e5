"""Nothing outside of the operands is read, nothing outside of the results written, all of them set.

The kernels run under a heap (guarded_heap.c) that puts every block at the edge of an inaccessible
page and fills fresh memory with NaN, in a process of their own: a mistake is a crash there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deconv_ext.testing import EDGE, TINY
from support import (
    C,
    assert_equal,
    cast,
    each_dtype,
    exact,
    implementations,
    run_if_accepted,
    use_isa,
)

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def heap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guarded heap, compiled."""
    library = tmp_path_factory.mktemp("heap") / "guarded_heap.so"
    source = str(HERE / "guarded_heap.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def work(heap: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, HERE / "bounds_worker.py", heap, *arguments],
        env={**os.environ, "LD_PRELOAD": str(heap), "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "isa,edge", [(isa, "end") for isa in C.cpu_isas()] + [(C.cpu_isas()[0], "begin")]
)
def test_kernels_touch_only_their_own(heap: Path, isa: str, edge: str) -> None:
    done = work(heap, edge, isa)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "touched nothing else" in done.stdout


@pytest.mark.parametrize("edge", ("end", "begin"))
@pytest.mark.parametrize("mistake", ("read", "write", "uninitialised"))
def test_the_heap_finds_mistakes(heap: Path, mistake: str, edge: str) -> None:
    done = work(heap, edge, "planted", mistake)
    clues = {
        "read": "Segmentation fault",
        "write": "overrun",
        "uninitialised": "fresh memory is NaN",
    }
    assert done.returncode != 0 and clues[mistake] in done.stderr, done


@each_dtype(torch.float32, torch.bfloat16, torch.complex64, torch.int64)
@implementations()
def test_every_element_of_the_result_is_set(
    op: str, algo: str, isa: str, dtype: torch.dtype
) -> None:
    """torch fills what it allocates with NaN (or the largest integer) while this is on."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poison = torch.empty(1000, dtype=dtype)
        assert (poison != poison).all() or (poison == torch.iinfo(torch.int64).max).all()
        with use_isa(isa):
            for case in (*EDGE, *TINY[::9]):
                operands, results = exact(case, dtype.is_complex)
                got = run_if_accepted(op, case, cast(operands, dtype), algo)
                if got is not None:
                    assert_equal(got, results[op].to(dtype), case)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = fill
