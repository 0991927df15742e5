"""Stage 3: is it right? Every algorithm against float64, derivatives, the README's promises."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from deconv_ext.bench_contenders import (
    LAYOUTS,
    PRECISIONS,
    contenders,
    precision_setting,
    product,
    torch_product,
)
from deconv_ext.build import extension
from deconv_ext.functional import conv_transpose2d
from deconv_ext.testing import EDGE, Case, Operands, make_case, relayout

from .context import PRODUCTS, Context, algorithms, arranged, conditions
from .journal import Job, Row, context_lives

#: Largest error relative to the largest value. Rounding of the result alone is half of 2^-11 in
#: float16, of 2^-8 in bfloat16; TF32 cuts both factors to 11 bits.
LIMIT = {"float64": 1e-13, "float32": 1e-5, "tf32": 3e-3, "float16": 1e-3, "bfloat16": 8e-3}


# --- every algorithm, configuration, dtype and layout ---------------------------------------------


@functools.lru_cache(maxsize=800)  # what algorithms and layouts of a dtype share
def want(case: Case, op: str, precision: str, exact: bool) -> tuple[Operands, Tensor]:
    """Operands, and the result in float64 of the definition's own loops on the CPU."""
    t = case.operands(sum(map(ord, case.name)), PRECISIONS[precision], exact=exact)
    wide = Operands(*(tensor.double() for tensor in t))
    return t, product(case, op, wide, "reference")()


def difference(got: Tensor, wanted: Tensor) -> float:
    """Largest, relative to the largest value; infinite if anything is not a number."""
    if not wanted.numel():
        return 0.0
    largest = float((got.double() - wanted).abs().max() / (wanted.abs().max() or 1.0))
    return largest if math.isfinite(largest) else math.inf


def matrix(context: Context, journal: Any, name: str, *choice: str) -> Iterator[Row]:
    """One algorithm in one dtype and layout, on every case."""
    op, algo, precision, layout = choice
    row: Row = dict(zip(("op", "algo", "dtype", "layout"), choice))
    row |= {"taken": 0, "declined": 0, "reason": None, "wrong": [], "error": 0.0, "at": None}
    row |= {"torch_error": 0.0}
    for case in context.small_cases():
        journal.at(name, case.name)
        for exact in (True, False):
            plain, wanted = want(case, op, precision, exact)
            t = arranged(plain, layout, context.device)
            with precision_setting(precision):
                try:
                    got = product(case, op, t, algo)().cpu()
                except RuntimeError as error:
                    why = str(error).splitlines()[0]
                    if not context_lives():
                        raise RuntimeError(f"{case}: {why}") from error
                    if "cannot take this problem" in why:
                        row["declined"] += 1
                        row["reason"] = row["reason"] or why
                    else:
                        row["wrong"].append(f"{case}: {why}")
                    break
                theirs = None
                if algo == "auto" and not exact and case.is_symmetric and case.batch:
                    with contextlib.suppress(RuntimeError):  # torch has gaps of its own
                        theirs = torch_product(case, op, t)().cpu()
            if exact:
                row["taken"] += 1
                if got.shape != wanted.shape or not torch.equal(got, wanted.to(got.dtype)):
                    row["wrong"].append(f"{case}: integers are not exact")
                continue
            found = difference(got, wanted)
            if found > LIMIT[precision]:
                row["wrong"].append(f"{case}: error {found:.1e}")
            if found > row["error"]:
                row["error"], row["at"] = found, case.name
            if theirs is not None:
                row["torch_error"] = max(row["torch_error"], difference(theirs, wanted))
    yield row
    if row["wrong"]:
        raise ValueError(f"{len(row['wrong'])} wrong: {'; '.join(row['wrong'][:3])}")


# --- derivatives ----------------------------------------------------------------------------------


def derivatives(context: Context, case: Case) -> Iterator[Row]:
    """First and second derivatives against finite differences, in float64."""
    t = case.operands(1, torch.float64)
    leaves = [tensor.to(context.device).requires_grad_() for tensor in (t.x, t.w, t.bias)]

    def function(*tensors: Tensor) -> Tensor:
        return conv_transpose2d(*tensors, **case.torch_arguments)

    first = gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    yield {"check": "gradcheck", "case": case.name, "ok": first}
    second = gradgradcheck(function, leaves, fast_mode=True)
    yield {"check": "gradgradcheck", "case": case.name, "ok": second}


def opinfo(context: Context, dtype: torch.dtype) -> Iterator[Row]:
    """torch's own samples of the operator: values, and derivatives in float64 and complex128."""
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError as error:  # torch's test support needs packages that it does not require
        yield {"check": "OpInfo", "dtype": str(dtype), "ok": None, "why": f"not run: {error}"}
        return
    # That import forbids setting torch.backends.* flags, for the whole process.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    op = next(op for op in op_db if op.name == "nn.functional.conv_transpose2d")
    count = 0
    for sample in op.sample_inputs(context.device.type, dtype):
        args = [sample.input, *sample.args]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        wanted = op.op(*(a if a is None else a.cpu().to(wide) for a in args), **sample.kwargs)
        with precision_setting("float32"):  # the tolerance is that of IEEE arithmetic
            got = conv_transpose2d(*args, **sample.kwargs).cpu()
        torch.testing.assert_close(got, wanted.to(dtype))
        if dtype in (torch.float64, torch.complex128):
            leaves = [a.detach().requires_grad_() for a in args if a is not None]
            keywords = sample.kwargs
            gradcheck(lambda *a, k=keywords: conv_transpose2d(*a, **k), leaves, fast_mode=True)
        count += 1
    yield {"check": "OpInfo", "dtype": str(dtype), "ok": count > 0, "samples": count}


# --- promises -------------------------------------------------------------------------------------


def _step(case: Case, precision: str, layout: str, context: Context, seed: int = 0) -> Any:
    function = contenders(case, "step", precision, layout, context.device, seed=seed)["ours"]
    return lambda: [*function()]


def _same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def repeatable(context: Context) -> Iterator[Row]:
    """Bitwise equal gradients in 100 training steps, in a geometry known to vary in cuDNN."""
    channels = 16 if context.dry else 192
    case = make_case("k5", (1, channels, 19, 27), channels, 5, 2, 2, 1)
    for precision, layout in conditions():
        with precision_setting(precision):
            step = _step(case, precision, layout, context)
            first = step()
            same = all(_same(step(), first) for _ in range(2 if context.dry else 99))
        yield {"check": "repeatable", "dtype": precision, "layout": layout, "ok": same}


def batch_invariant(context: Context) -> Iterator[Row]:
    """A sample's result has the same bits whatever the batch around it."""
    for (precision, layout), op in itertools.product(conditions(), ("forward", "grad_input")):
        bad = []
        for case in context.layers()[:12]:
            case = case.reduced(50_000_000)
            if case.batch < 2:
                continue
            t = case.operands(3, PRECISIONS[precision])
            x, w, bias, dy = (tensor.to(context.device) for tensor in t)
            with precision_setting(precision):
                results = [
                    product(
                        case, op, Operands(*(relayout(a, layout) for a in (u, w)), bias, v), "auto"
                    )()
                    for u, v in ((x, relayout(dy, layout)), (x[:1], relayout(dy[:1], layout)))
                ]
            if not torch.equal(results[0][:1], results[1]):
                bad.append(case.name)
        found = {"dtype": precision, "layout": layout, "op": op, "ok": not bad, "differ": bad}
        yield {"check": "batch invariant"} | found


def graph_replay(context: Context) -> Iterator[Row]:
    """A captured training step computes what the eager one does, on new numbers as well."""
    for case in context.layers()[:8]:
        leaves = [tensor.cuda() for tensor in case.operands(5)]
        for leaf in leaves[:3]:
            leaf.requires_grad_()

        def step(c: Case = case, t: list[Tensor] = leaves) -> list[Tensor]:
            y = conv_transpose2d(*t[:3], **c.torch_arguments)
            return [*torch.autograd.grad(y, t[:3], t[3])]

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            leaves[0].mul_(-2)
        graph.replay()
        yield {"check": "graph replay", "case": case.name, "ok": _same(captured, step())}


def two_streams(context: Context) -> Iterator[Row]:
    """Steps that run beside each other on two streams do not disturb each other."""
    steps = [_step(c, "float32", "contiguous", context, 7) for c in context.layers()[:6]]
    wanted = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found: list[list[Tensor]] = []
    for turn in range(20):
        for index, step in enumerate(steps):
            with torch.cuda.stream(streams[(turn + index) % 2]):
                found.append(step())
    torch.cuda.synchronize()
    same = all(_same(got, wanted[i % len(steps)]) for i, got in enumerate(found))
    yield {"check": "two streams", "ok": same}


def other_device(context: Context) -> Iterator[Row]:
    """Tensors of a device that is not the current one."""
    if torch.cuda.device_count() < 2:
        yield {"check": "two devices", "ok": None, "why": "not run: this machine has one"}
        return
    case = context.layers()[0]
    t = case.operands(9)
    results = []
    for name in ("cuda:0", "cuda:1"):
        results.append(product(case, "forward", Operands(*(a.to(name) for a in t)), "auto")().cpu())
    yield {"check": "two devices", "ok": torch.equal(*results)}


def beyond_31_bits(context: Context) -> Iterator[Row]:
    """Offsets past 2^31 elements: the end of a large result is that of the end alone."""
    side, batch = (40, 9) if context.dry else (8200, 40)
    shapes = {"image": (1, 8, side, side), "batch": (batch, 8, 1 + side // 6, 1 + side // 6)}
    for (name, shape), layout in itertools.product(shapes.items(), LAYOUTS):
        case = make_case(name, shape, 8, 2, 2)
        x = relayout(torch.randn(shape, device=context.device).bfloat16(), layout)
        w = relayout(torch.randn(case.w_shape, device=context.device).bfloat16(), layout)
        y = conv_transpose2d(x, w, stride=2)
        tail = relayout(x[-1:, :, -2:], layout)
        y_tail = conv_transpose2d(tail, w, stride=2)
        dx = extension().grad_input(y, w, case.input_size, *case.geometry)
        few = make_case("tail", tuple(tail.shape), 8, 2, 2)  # type: ignore[arg-type]
        dy = relayout(y[-1:, :, -4:], layout)
        dtail = extension().grad_input(dy, w, few.input_size, *few.geometry)
        pairs = (y[-1:, :, -4:], y_tail), (dx[-1:, :, -2:], dtail)
        errors = [difference(end, alone.double()) for end, alone in pairs]
        right = max(errors) <= LIMIT["bfloat16"]
        found = {"elements": y.numel(), "layout": layout, "errors": errors, "ok": right}
        yield {"check": f"beyond 2^31 elements, {name}"} | found


def cold_call(context: Context) -> Iterator[Row]:
    """No search or compilation at the first call on a new shape."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if context.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for case in context.layers()[:8]:
        shape = (1, case.c_in, case.h + 1, case.w + 1)
        new = make_case(case.name, shape, case.c_out, 4, 2, 1, groups=case.groups)
        step = _step(new, "float32", "contiguous", context)
        cold = seconds(step)
        warm = statistics.median(seconds(step) for _ in range(10))
        found = {"case": case.name, "cold_us": 1e6 * cold, "warm_us": 1e6 * warm}
        yield {"check": "cold call"} | found | {"ok": None}  # a figure, judged by the reader


def jobs(context: Context, journal: Any) -> Iterator[Job]:
    """Our own choices first, then what is most likely to find something."""

    def forced(pick: Callable[[str], bool]) -> Iterator[Job]:
        for (precision, layout), op in itertools.product(conditions(), PRODUCTS):
            for algo in filter(pick, algorithms(op, context.device)):
                name = f"matrix {op} {algo} {precision} {layout}"
                choice = (name, op, algo, precision, layout)
                yield name, lambda c=choice: matrix(context, journal, *c)

    yield from context.some(forced(lambda algo: algo == "auto"))
    smooth = [case for case in EDGE if case.is_symmetric and case.batch and case.macs < 20_000]
    for case in smooth[:2] if context.dry else smooth[:16]:
        yield f"derivatives {case}", lambda c=case: derivatives(context, c)
    checks = [repeatable, batch_invariant, cold_call, beyond_31_bits]
    if not context.dry:
        checks += [graph_replay, two_streams, other_device]
    for check in checks:
        yield check.__name__, lambda c=check: c(context)
    yield from context.some(forced(lambda algo: algo != "auto"))
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex128):
        yield f"OpInfo {dtype}", lambda d=dtype: opinfo(context, d)


def correctness(context: Context, _: str) -> None:
    """Everything of this file but the test suite."""
    journal = context.journal("3-correctness", limits=LIMIT)
    journal.run(jobs(context, journal))


# --- the test suite -------------------------------------------------------------------------------


def suite(context: Context, _: str) -> None:
    """pytest: what is marked for a GPU, then the rest that is not slow."""
    journal = context.journal("3-correctness", limits=LIMIT)

    def pytest(expression: str) -> Iterator[Row]:
        row: Row = {"check": f"pytest -m '{expression}'"}
        command = [sys.executable, "-m", "pytest", "-q", "-m", expression, "-p", "no:cacheprovider"]
        command.append("--continue-on-collection-errors")
        command.append("tests/test_geometry.py" if context.dry else "tests")
        limit = max(60.0, context.left())
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as cut:
            text = (cut.stdout or b"").decode() if isinstance(cut.stdout, bytes) else cut.stdout
            yield row | {"ok": None, "why": f"cut after {limit:.0f} s", "tail": tail(text or "")}
            return
        if "No module named pytest" in done.stderr:
            yield row | {"ok": None, "why": "not run: no pytest here"}
            return
        counts = {key: int(n) for n, key in re.findall(r"(\d+) (\w+)", done.stdout[-300:])}
        found = {"returncode": done.returncode, "counts": counts, "tail": tail(done.stdout)}
        yield row | {"ok": done.returncode in (0, 5)} | found  # 5: no test has the mark

    def tail(text: str) -> list[str]:
        return text.splitlines()[-60:]

    expressions = ["not gpu and not slow"] if context.dry else ["gpu", "not gpu and not slow"]
    journal.run([(f"pytest {each}", lambda e=each: pytest(e)) for each in expressions])
