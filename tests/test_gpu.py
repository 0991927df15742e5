"""On a GPU: graphs, streams, devices, pinned memory, autocast and compilation, in eager's company.

The campaign runs these (benchmarks/gpu_campaign.sh). Kernels themselves are tested without a GPU in
test_cuda_on_cpu.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import deconv_ext
from deconv_ext import tuning
from deconv_ext.bench_contenders import precision_setting
from deconv_ext.functional import conv_transpose2d
from deconv_ext.testing import Case, make_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
# One for each family of kernels.
CASES = (
    make_case("overlapping", (4, 32, 12, 16), 24, 4, 2, 1),
    make_case("kernel_is_stride", (2, 40, 9, 8), 16, 2, 2),
    make_case("depthwise", (2, 24, 11, 13), 24, 4, 2, 1, groups=24),
    make_case("few_outputs", (2, 48, 10, 10), 3, 4, 2, 1),
    make_case("large_stride", (2, 5, 4, 4), 5, 16, 8, 4),
)
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def leaves(case: Case, dtype: torch.dtype = torch.float32, device: str = "") -> list[Tensor]:
    """x, w, bias that need gradients, and dy."""
    t = [tensor.to(device or DEVICE, dtype) for tensor in case.operands(1)]
    return [*(tensor.requires_grad_() for tensor in t[:3]), t[3]]


def step(case: Case, t: list[Tensor]) -> list[Tensor]:
    """The result and all gradients."""
    y = conv_transpose2d(*t[:3], **case.torch_arguments)
    return [y.detach(), *torch.autograd.grad(y, t[:3], t[3])]


def wanted(case: Case, t: list[Tensor]) -> list[Tensor]:
    """The same in float64 on the CPU."""
    x, w, b, dy = (tensor.detach().cpu().double() for tensor in t)
    for leaf in (x, w, b):
        leaf.requires_grad_()
    y = F.conv_transpose2d(x, w, b, **case.torch_arguments)
    return [y.detach(), *torch.autograd.grad(y, (x, w, b), dy)]


def assert_right(case: Case, got: list[Tensor], t: list[Tensor]) -> None:
    for have, want in zip(got, wanted(case, t), strict=True):
        assert_close(have.cpu().double(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.fixture(autouse=True)
def ieee():
    with precision_setting("float32"):
        yield


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# --- CUDA graphs ---------------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_captured_step_is_replayed_on_new_numbers(case: Case, dtype: torch.dtype) -> None:
    """The very first call of the process may be the captured one: nothing synchronises."""
    t = leaves(case, dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, t)
    with torch.no_grad():
        for tensor in t:
            tensor.mul_(-2)
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    assert_same(captured, step(case, t))


def test_make_graphed_callables() -> None:
    layer = deconv_ext.ConvTranspose2d(8, 6, 4, 2, 1).to(DEVICE)
    x = torch.randn(2, 8, 6, 6, device=DEVICE, requires_grad=True)
    want = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    graphed = torch.cuda.make_graphed_callables(layer, (torch.randn_like(x).requires_grad_(),))
    assert_same([*torch.autograd.grad(graphed(x).sum(), [x, *layer.parameters()])], [*want])


# --- streams, memory, devices --------------------------------------------------------------------


@each_case
def test_on_a_side_stream_what_it_made_is_used(case: Case) -> None:
    """The kernels wait for what their own stream has queued, and for nothing else."""
    t = leaves(case)
    want = step(case, t)
    numbers = [tensor.detach().clone() for tensor in t]
    with torch.no_grad():
        for tensor in t:
            tensor.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about 10 ms: whoever does not wait reads zeros
        with torch.no_grad():
            for tensor, number in zip(t, numbers):
                tensor.copy_(number)
        got = step(case, t)
        assert not stream.query()  # the host did not wait either
    torch.cuda.synchronize()
    assert_same(got, want)


def test_many_streams_share_no_workspace() -> None:
    problems = [(case, leaves(case)) for case in CASES]
    want = [step(*problem) for problem in problems]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for turn in range(25):
        for i, problem in enumerate(problems):
            with torch.cuda.stream(streams[(turn + i) % len(streams)]):
                found.append((i, step(*problem)))
    torch.cuda.synchronize()
    for i, got in found:
        assert_same(got, want[i])


def test_workspaces_are_given_back() -> None:
    t = leaves(CASES[0])
    step(CASES[0], t)
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step(CASES[0], t)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_is_that_of_the_operands_not_the_current_one() -> None:
    case = CASES[0]
    t = leaves(case, device="cuda:1")
    with torch.cuda.device(0):
        got = step(case, t)
        assert torch.cuda.current_device() == 0
    assert {tensor.device for tensor in got} == {torch.device("cuda", 1)}
    assert_right(case, got, t)
    with pytest.raises(RuntimeError, match="on the same device"):
        conv_transpose2d(t[0], t[1].to("cuda:0"))


def test_operands_on_a_cpu_are_refused_beside_those_on_a_gpu() -> None:
    x, w, b, _ = leaves(CASES[0])
    with pytest.raises(RuntimeError, match="on the same device.*cuda:0.*cpu"):
        conv_transpose2d(x, w.cpu(), b)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
def test_inputs_that_are_still_being_copied(pinned: bool) -> None:
    case = make_case("large", (8, 32, 64, 64), 16, 4, 2, 1)
    x, w, b, dy = case.operands(1)
    x = x.pin_memory() if pinned else x
    on_gpu = [w.to(DEVICE), b.to(DEVICE)]
    for _ in range(3):
        torch.cuda._sleep(5_000_000)
        y = conv_transpose2d(x.to(DEVICE, non_blocking=True), *on_gpu, **case.torch_arguments)
        back = torch.empty(y.shape, pin_memory=pinned)
        back.copy_(y, non_blocking=True)
        torch.cuda.synchronize()
        assert_close(
            back, F.conv_transpose2d(x, w, b, **case.torch_arguments), rtol=1e-4, atol=1e-3
        )


# --- autocast, compilation, autotune -------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_grad_scaler(dtype: torch.dtype) -> None:
    """dtypes are torch's, and a scaled step moves the weights where an unscaled one does."""
    ours = deconv_ext.ConvTranspose2d(8, 6, 4, 2, 1).to(DEVICE)
    theirs = nn.ConvTranspose2d(8, 6, 4, 2, 1).to(DEVICE)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 8, 6, 6, device=DEVICE)
    for layer in (ours, theirs):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        with torch.autocast(DEVICE, dtype):
            y = layer(x)
            loss = y.float().square().mean()
        assert y.dtype == dtype
        scaler.scale(loss).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
        scaler.step(optimizer)
        scaler.update()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert_close(a, b, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_compiled_forward_and_backward(layout: torch.memory_format, mode: str) -> None:
    """One graph, with CUDA graphs in the second mode."""
    model = nn.Sequential(deconv_ext.ConvTranspose2d(8, 6, 4, 2, 1), nn.ReLU())
    model = model.to(DEVICE, memory_format=layout)
    x = torch.randn(2, 8, 6, 6, device=DEVICE).to(memory_format=layout).requires_grad_()
    function = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        got = function(x)
        want = model(x)
        assert got.stride() == want.stride()
        assert_close(got, want)
        grads = torch.autograd.grad(got.square().sum(), [x, *model.parameters()])
        wants = torch.autograd.grad(want.square().sum(), [x, *model.parameters()])
        assert_close(grads, wants)


@each_case
def test_autotune(case: Case, tmp_path: Path) -> None:
    """Configurations are timed, what is chosen is right, and it is captured as well."""
    t = leaves(case)
    try:
        with deconv_ext.autotune(tmp_path / "tuned.json", seconds=0.01) as entries:
            step(case, t)
        assert {entry["op"] for entry in entries} == {"forward", "grad_input", "grad_weight"}
        for entry in entries:
            assert entry["device"] == torch.cuda.get_device_name() and entry["threads"] == 0
            assert any(":" in name for name in entry["us"]) and "generic" not in entry["us"]
        assert_right(case, step(case, t), t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(case, t)
        graph.replay()
        assert_same(captured, step(case, t))
    finally:
        tuning.clear()
