"""What leaves Python: torch.export, AOTInductor, make_fx, torch.fx, torch.jit.trace, ONNX."""

import io
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils import cpp_extension

import deconv_ext
from deconv_ext import ops

OURS = torch.ops.deconv_ext.conv_transpose2d.default
PADDINGS = {"symmetric": 1, "asymmetric": ((0, 1), (2, 0)), "same": "same"}
each_padding = pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)


def layer_of(padding=1, **kwargs):
    return deconv_ext.ConvTranspose2d(4, 6, 3, 2, padding, groups=2, **kwargs).eval()


def image(*size):
    return torch.randn(*(size or (2, 4, 5, 3)))


def targets(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


# --- graphs --------------------------------------------------------------------------------------


@each_padding
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_and_run(padding, strict):
    layer = layer_of(padding)
    batch, height = Dim("batch"), Dim("height")
    program = torch.export.export(
        layer, (image(),), strict=strict, dynamic_shapes=({0: batch, 2: height},)
    )
    assert OURS in targets(program.graph)
    for size in ((2, 4, 5, 3), (3, 4, 9, 3)):
        x = image(*size)
        assert_close(program.module()(x), layer(x))
    lowered = program.run_decompositions()
    assert OURS in targets(lowered.graph)
    assert_close(lowered.module()(x), layer(x))


LOAD = """
import sys, torch
import deconv_ext.ops
x, want = torch.load(sys.argv[2])
torch.testing.assert_close(torch.export.load(sys.argv[1]).module()(x), want)
"""


def test_exported_program_in_another_process(tmp_path):
    layer, x = layer_of(), image()
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    torch.save((x, layer(x).detach()), tmp_path / "values.pt")
    paths = [str(tmp_path / name) for name in ("layer.pt2", "values.pt")]
    done = subprocess.run([sys.executable, "-c", LOAD, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_aot_inductor_package(tmp_path):
    """Compiled ahead of time and loaded, by Python and by a program without Python code."""
    model = nn.Sequential(layer_of("same"), nn.ReLU()).eval()
    x = image()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: Dim("batch", max=64)},))
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for size in ((2, 4, 5, 3), (5, 4, 5, 3)):
            x = image(*size)
            assert_close(loaded(x), model(x))
        program = build_program(tmp_path)
        library = deconv_ext.build_info()["path"]
        command = [str(each) for each in (program, library, package, *x.shape)]
        done = subprocess.run(
            command, input=x.numpy().tobytes(), stdout=subprocess.PIPE, check=True
        )
        want = model(x)
    assert torch.equal(torch.frombuffer(bytearray(done.stdout), dtype=x.dtype), want.flatten())


def build_program(directory):
    """examples/exported.cpp, compiled as its head says."""
    program = directory / "exported"
    libraries = [*cpp_extension.library_paths(), sysconfig.get_config_var("LIBDIR")]
    command = ["g++", "-std=c++20", "examples/exported.cpp", "-o", program]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command += [f"{flag}{path}" for path in libraries for flag in ("-L", "-Wl,-rpath,")]
    names = ("torch", "torch_cpu", "c10", "torch_python")
    command += ["-Wl,--no-as-needed", *(f"-l{name}" for name in names)]
    command += ["-lpython" + sysconfig.get_config_var("LDVERSION")]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    return program


@each_padding
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(padding, mode):
    layer = layer_of(padding).requires_grad_(False)
    weights = dict(layer.named_parameters())

    def function(x, weights):
        return torch.func.functional_call(layer, weights, x)

    traced = make_fx(function, tracing_mode=mode)(image(), weights)
    assert OURS in targets(traced.graph)
    x = image(3, 4, 6, 5) if mode == "symbolic" else image()
    assert_close(traced(x, weights), layer(x))


def test_make_fx_of_gradients():
    layer, x = layer_of(), image()
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, x).sin().sum()

    function = torch.func.grad(loss, (0, 1))
    traced = make_fx(function)(weights, x)
    assert torch.ops.deconv_ext.conv_transpose2d_grad_weight.default in targets(traced.graph)
    x = image()
    assert_close(traced(weights, x), function(weights, x))


def test_fx_symbolic_trace_keeps_our_function():
    model = nn.Sequential(layer_of("same"), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    assert deconv_ext.functional.conv_transpose2d in [n.target for n in traced.graph.nodes]
    x = image()
    assert_close(traced(x), model(x))


@each_padding
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "with gradients"])
def test_jit_trace(padding, trained):
    layer, x, buffer = layer_of(padding).requires_grad_(trained), image(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(layer, x)
        torch.jit.save(traced, buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    assert "deconv_ext::conv_transpose2d" in str(traced.inlined_graph)
    x = image(3, 4, 5, 3)
    assert_close(loaded(x), layer(x))
    if trained:
        loss, want = loaded(x).sin().sum(), layer(x).sin().sum()
        assert_close(
            torch.autograd.grad(loss, list(loaded.parameters())),
            torch.autograd.grad(want, list(layer.parameters())),
        )


# --- ONNX ----------------------------------------------------------------------------------------

ONNX_CASES = {
    "k4 s2": {"kernel_size": 4, "stride": 2, "padding": 1},
    "groups": {"kernel_size": 3, "groups": 2, "bias": False},
    "dilation": {"kernel_size": (3, 2), "stride": 3, "dilation": (1, 2), "output_padding": 1},
    "asymmetric": {"kernel_size": 3, "stride": 2, "padding": ((0, 1), (2, 0))},
    "same": {"kernel_size": 3, "stride": 2, "padding": "same"},
}


@pytest.mark.parametrize("name", ONNX_CASES)
def test_onnx(name):
    """One standard node with our layer's result in ONNX Runtime, at another size too."""
    import onnxruntime  # takes long

    model = nn.Sequential(deconv_ext.ConvTranspose2d(4, 6, **ONNX_CASES[name]), nn.ReLU()).eval()
    program = torch.onnx.export(
        model,
        (image(),),
        dynamo=True,
        dynamic_shapes=({0: Dim("batch"), 2: Dim("height")},),
        custom_translation_table=ops.onnx_translations(),
        verbose=False,
    )
    nodes = [(node.op_type, node.domain) for node in program.model_proto.graph.node]
    assert sorted(nodes) == [("ConvTranspose", ""), ("Relu", "")]
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in ((2, 4, 5, 3), (3, 4, 7, 3)):
        x = image(*size)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)
