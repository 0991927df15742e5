"""Forward float32 of every layer on a CPU: ours, torch, ONNX Runtime, OpenVINO, TensorFlow and JAX.

    pip install -r benchmarks/peers-requirements.txt     # what is not installed is left out
    python benchmarks/peers.py --threads 2 --output peers.json

All of them run in turns in one process, on the same numbers and as many threads, and are compared
with torch before they are timed. A peer gets what it is deployed with: weights that it may prepare
beforehand (we and torch pack ours in every call), and the layout it is made for. For a ratio, our
time in that layout is taken.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deconv_ext import bench_contenders, bench_table  # noqa: E402
from deconv_ext.bench import with_progress  # noqa: E402
from deconv_ext.bench_machine import environment  # noqa: E402
from deconv_ext.bench_timing import Function, GatedTimer  # noqa: E402
from deconv_ext.testing import Case, Operands, load_layers  # noqa: E402

CPU = torch.device("cpu")
REQUIREMENTS = Path(__file__).with_name("peers-requirements.txt")
Array = NDArray[np.float32]


# ---- the peers -----------------------------------------------------------------------------------


@functools.lru_cache(1)  # two peers read the same model
def onnx_model(case: Case, t: Operands) -> bytes:
    """A graph of one node, its weights constant."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [
        numpy_helper.from_array(v.numpy(), name) for v, name in ((t.w, "w"), (t.bias, "b"))
    ]
    node = helper.make_node(
        "ConvTranspose",
        ["x", "w", "b"],
        ["y"],
        kernel_shape=case.kernel,
        strides=case.stride,
        pads=(*case.padding[::2], *case.padding[1::2]),
        output_padding=case.output_padding,
        dilations=case.dilation,
        group=case.groups,
    )
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)]
        for name, shape in (("x", case.x_shape), ("y", case.y_shape))
    ]
    model = helper.make_model(
        helper.make_graph([node], "layer", *ends, constants),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    return model.SerializeToString()


def onnx_runtime(case: Case, t: Operands, threads: int) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    # Threads that still spin for the next call would take the processors from the next contender.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        onnx_model(case, t), options, providers=["CPUExecutionProvider"]
    )
    inputs = {"x": t.x.numpy()}
    return lambda: session.run(None, inputs)[0]


def openvino(case: Case, t: Operands, threads: int) -> Function:
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    model = core.read_model(io.BytesIO(onnx_model(case, t)))
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    x = openvino.Tensor(t.x.numpy(), shared_memory=True)
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


def tensorflow(case: Case, t: Operands, threads: int) -> Function:
    """NHWC, filters [kH, kW, C_out, C_in]. Its own kernels know neither groups, but for depthwise
    ones, nor dilation: XLA compiles the other layers."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    import tensorflow as tf

    if tf.config.threading.get_intra_op_parallelism_threads() != threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    n, c_out, height, width = case.y_shape
    top, bottom, left, right = case.padding
    depthwise = case.groups == case.c_in == c_out and case.stride[0] == case.stride[1]
    depthwise = depthwise and case.dilation == (1, 1)
    operation: Callable[..., Any]
    if depthwise:
        filters, operation = t.w.permute(2, 3, 0, 1), tf.nn.depthwise_conv2d_backprop_input
        names = ("input_sizes", "filter", "out_backprop")
    else:
        filters, operation = t.w.permute(2, 3, 1, 0), tf.nn.conv2d_transpose
        names = ("output_shape", "filters", "input")
    keywords: dict[str, Any] = {
        "strides": (1, *case.stride, 1),
        "padding": ((0, 0), (top, bottom), (left, right), (0, 0)),
        "dilations": case.dilation if depthwise else (1, *case.dilation, 1),
    }
    x, w = tf.constant(nhwc(t.x)), tf.constant(filters.contiguous().numpy())
    bias = tf.constant(t.bias.numpy())

    @tf.function(jit_compile=not depthwise and (case.groups > 1 or case.dilation != (1, 1)))
    def layer(x: Any, w: Any, bias: Any) -> Any:
        y = operation(**dict(zip(names, ((n, height, width, c_out), w, x))), **keywords)
        return tf.nn.bias_add(y, bias)

    return lambda: layer(x, w, bias)


def jax(case: Case, t: Operands, threads: int) -> Function:
    """NHWC, as the correlation of the dilated image with the kernel turned round, which is what
    jax.lax.conv_transpose makes of it; that one takes no groups."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    per_group = t.w.unflatten(0, (case.groups, -1)).flip(-2, -1)  # [g, C_in/g, C_out/g, kH, kW]
    filters = per_group.permute(3, 4, 1, 0, 2).flatten(3)  # [kH, kW, C_in/g, C_out]
    padding = [
        (d * (k - 1) - before, d * (k - 1) - after + extra)
        for d, k, before, after, extra in zip(
            *(case.dilation, case.kernel, case.padding[::2], case.padding[1::2]),
            case.output_padding,
        )
    ]

    @jax.jit
    def layer(x: Any, w: Any, bias: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            *(x, w, (1, 1), padding),
            lhs_dilation=case.stride,
            rhs_dilation=case.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=case.groups,
        )
        return y + bias

    arrays = [jax.device_put(v) for v in (nhwc(t.x), filters.contiguous().numpy(), t.bias.numpy())]
    return lambda: layer(*arrays).block_until_ready()


def nhwc(image: torch.Tensor) -> Array:
    return image.permute(0, 2, 3, 1).contiguous().numpy()


class Peer(NamedTuple):
    """`prepare(case, operands, threads)` gives the function to time, its result in `layout`."""

    name: str
    package: str
    layout: str  # one of bench_contenders.LAYOUTS; channels_last is NHWC
    prepare: Callable[[Case, Operands, int], Function]

    @property
    def version(self) -> str | None:
        """None where it is not installed."""
        if not importlib.util.find_spec(self.package):
            return None
        for name in (self.package, f"{self.package}-cpu"):
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                pass
        return "unknown"

    def result(self, function: Function) -> torch.Tensor:
        """What the function computes, as NCHW."""
        y = torch.tensor(np.asarray(function()))
        return y.permute(0, 3, 1, 2) if self.layout == "channels_last" else y


PEERS = (
    Peer("ONNX Runtime", "onnxruntime", "contiguous", onnx_runtime),
    Peer("OpenVINO", "openvino", "contiguous", openvino),
    Peer("TensorFlow", "tensorflow", "channels_last", tensorflow),
    Peer("JAX", "jax", "channels_last", jax),
)


# ---- measuring -----------------------------------------------------------------------------------


class RestingTimer(GatedTimer):
    """Lets the threads of the contender before fall asleep, and those of this one wake up: idle
    threads of some libraries spin for a few milliseconds."""

    REST = 5e-3

    def sample(self, function: Function, calls: int) -> float:
        time.sleep(self.REST)
        function()
        seconds = super().sample(function, calls)
        time.sleep(self.REST)
        return seconds


def measure(case: Case, peers: Iterable[Peer], timer: GatedTimer, threads: int) -> dict[str, Any]:
    """A row: microseconds of each contender, which of them are noisy, and who declined and why.

    Raises ValueError where a peer computes something else than torch.
    """
    t = bench_contenders.operands(case, "float32", "contiguous", CPU)
    functions: dict[str, Function] = {}
    for layout in bench_contenders.LAYOUTS:
        pair = bench_contenders.contenders(case, "forward", "float32", layout, CPU)
        functions |= {f"{who} {layout}": pair[who] for who in ("ours", "torch")}
    want = bench_contenders.truth(case, "forward", "float32", CPU)
    for name, function in functions.items():
        found = bench_contenders.error(bench_contenders.results(function), want)
        bench_contenders.check(found, "float32", f"{case} {name}")
    declined = {}
    for peer in peers:
        try:
            function = peer.prepare(case, t, threads)
            result = peer.result(function)
        except Exception as error:  # each has exceptions of its own for what it lacks
            declined[peer.name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        if result.shape != case.y_shape:
            raise ValueError(f"{case} {peer.name}: got {tuple(result.shape)}, want {case.y_shape}")
        found = bench_contenders.error([result.double()], want)
        bench_contenders.check(found, "float32", f"{case} {peer.name}")
        functions[peer.name] = function
    timings = timer.compare(lambda _: functions)
    return {
        "layer": case.name,
        "class": case.kind,
        "us": {name: timing.us for name, timing in timings.items()},
        "noisy": [name for name, timing in timings.items() if timing.noisy],
        "declined": declined,
    }


# ---- the table -----------------------------------------------------------------------------------


def ratio(row: dict[str, Any], peer: Peer) -> float | None:
    """How many times as fast as the peer we are, in its layout; None where it declined."""
    us = row["us"]
    return us[peer.name] / us[f"ours {peer.layout}"] if peer.name in us else None


def cells(row: dict[str, Any], peers: Sequence[Peer]) -> list[str]:
    """Layer and class; our microseconds in both layouts; of each peer its own, and the ratio."""

    def microseconds(name: str) -> str:
        return f"{'~' * (name in row['noisy'])}{row['us'][name]:.0f}"

    ours = [microseconds(f"ours {layout}") for layout in bench_contenders.LAYOUTS]
    theirs = [
        f"{microseconds(peer.name)} ({found:.2f}x)" if (found := ratio(row, peer)) else "declined"
        for peer in peers
    ]
    return [row["layer"], row["class"], *ours, *theirs]


def header(peers: Sequence[Peer]) -> list[list[str]]:
    names = [bench_table.LAYOUT_NAMES[layout] for layout in bench_contenders.LAYOUTS]
    columns = [f"ours {name}" for name in names] + [peer.name for peer in peers]
    return [["layer", "class", *columns], ["---", "---", *["---:"] * len(columns)]]


def line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def summary(rows: Sequence[dict[str, Any]], peers: Sequence[Peer]) -> str:
    """Of each peer: the geometric mean of the ratios, and the layers on which it is ahead."""
    lines = []
    for peer in peers:
        ratios = {row["layer"]: found for row in rows if (found := ratio(row, peer))}
        if not ratios:
            lines.append(f"{peer.name}: declined every layer")
            continue
        behind = sorted((found, name) for name, found in ratios.items() if found < 1)
        mean, ahead = bench_table.geomean(ratios.values()), len(ratios) - len(behind)
        text = f"{peer.name}: {mean:.2f}x, we are ahead on {ahead} of {len(ratios)}"
        if behind:
            text += "; not on " + ", ".join(f"{name} {found:.2f}x" for found, name in behind)
        lines.append(text)
        reasons = {row["declined"][peer.name]: None for row in rows if peer.name in row["declined"]}
        lines += [f"  declined: {reason}" for reason in reasons]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="", help="only layers whose name matches this regex")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--samples", type=int, default=9, help="quiet ones of each; default 9")
    parser.add_argument("--seconds", type=float, default=1.0, help="time limit of a measurement")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the result there")
    options = parser.parse_args(argv)

    # Some libraries start as many threads as there are processors, whatever they are told.
    processors = sorted(os.sched_getaffinity(0))
    if not 1 <= options.threads <= len(processors):
        parser.error(f"--threads must be from 1 to {len(processors)}, got {options.threads}")
    os.sched_setaffinity(0, processors[: options.threads])
    torch.set_num_threads(options.threads)

    versions = {peer.name: peer.version for peer in PEERS}
    peers = [peer for peer in PEERS if versions[peer.name]]
    facts = environment(CPU, dtype="float32", peers=versions)
    known = ", ".join(f"{peer.name} {versions[peer.name]}" for peer in peers)
    print(f"{bench_table.where(facts)}, torch {facts['torch']}, commit {facts['commit']}; {known}")
    for peer in PEERS:
        if peer not in peers:
            print(f"{peer.name} is not installed and left out: pip install -r {REQUIREMENTS}")
    print("Microseconds of each; in brackets, how many times as fast we are in the same layout.\n")
    print(*map(line, header(peers)), sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    timer = RestingTimer(CPU, options.samples, options.seconds)
    cases = [case for case in load_layers() if re.search(options.layers, case.name)]
    for case in with_progress(cases):
        rows.append(measure(case, peers, timer, options.threads))
        print(line(cells(rows[-1], peers)), flush=True)
        if options.output:
            bench_table.dump(options.output, {"facts": facts, "rows": rows})
    print(f"\n{summary(rows, peers)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
