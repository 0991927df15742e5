"""What TensorFlow and Keras answer to the calls in this file: computes tests/data/tensorflow.npz.

    python -m venv .venv-tf && .venv-tf/bin/pip install tensorflow-cpu
    .venv-tf/bin/python tests/tensorflow_results.py           # write the file
    .venv-tf/bin/python tests/tensorflow_results.py --check   # compare with the file

Needs neither torch nor this package, so that TensorFlow can stay in an environment of its own.
Operands are small integers, whose sums are exact in every dtype here: results are compared by
equality. TensorFlow's eager CPU kernels take neither dilation, groups nor NCHW; those calls, and
only those, are compiled by XLA, which does.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).parent / "data" / "tensorflow.npz"
Array = NDArray[Any]


def pattern(shape: tuple[int, ...], seed: int, largest: int = 6) -> Array:
    """Integers from -largest to largest that look random, the same for ever."""
    i = np.arange(np.prod(shape, dtype=np.int64)).astype(np.uint64) + np.uint64(1000003 * seed)
    for _ in range(2):
        i = (i * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)) ^ (
            i >> np.uint64(29)
        )
    return ((i >> np.uint64(33)) % np.uint64(2 * largest + 1)).astype(np.int64).reshape(
        shape
    ) - largest


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of conv2d_transpose; all but the first two are its arguments."""

    x: tuple[int, ...]
    filters: tuple[int, ...]
    output_shape: Any
    strides: Any = 1
    padding: Any = "SAME"
    data_format: Any = "NHWC"
    dilations: Any = None
    dtype: str = "float32"

    @property
    def keywords(self) -> dict[str, Any]:
        names = ("output_shape", "strides", "padding", "data_format", "dilations")
        return {name: getattr(self, name) for name in names}

    @property
    def has_gradients(self) -> bool:
        """False also without pixels, where the eager kernel returns memory that it never wrote."""
        return self.dtype != "int32" and 0 not in self.x

    def operands(self) -> tuple[Array, Array]:
        largest = 2 if self.dtype in ("float16", "bfloat16") else 6
        return pattern(self.x, 1, largest), pattern(self.filters, 2, largest)


def sweep() -> Iterator[tuple[str, Call]]:
    """Kernel, stride, dilation, padding, and every output height near those that fit."""
    for k, s, d, padding in itertools.product(range(1, 6), (1, 2, 3), (1, 2), ("SAME", "VALID")):
        if d > 1 and k not in (2, 3):
            continue
        extent, height = d * (k - 1) + 1, 3
        w = 6 if padding == "SAME" else 5 + d - 1
        for out in range(max((height - 1) * s - 1, 0), (height - 1) * s + extent + s + 2):
            strides = (s, 2)
            if padding == "SAME" and out == (height - 1) * s + 1:
                strides = [1, s, 2, 1]
            yield (
                f"sweep k{k} s{s} d{d} {padding} {out}",
                Call(
                    (1, height, 3 if padding == "SAME" else 2, 2),
                    (k, 2 if padding == "SAME" else 3, 3, 2),
                    (1, out, w, 3),
                    strides,
                    padding,
                    dilations=d if d > 1 else None,
                ),
            )


def explicit(*sides: int) -> list[list[int]]:
    return [[0, 0], list(sides[:2]), list(sides[2:]), [0, 0]]


X, W, Y = (2, 4, 5, 3), (3, 3, 6, 3), (2, 8, 10, 6)
NX, NY = (2, 3, 4, 5), (2, 6, 8, 10)
BASE = Call(X, W, Y, 2)


def base(**changes: Any) -> Call:
    return dataclasses.replace(BASE, **changes)


#: Calls that TensorFlow takes on at least one of its devices.
TAKEN = {
    "stride an int": BASE,
    "stride a list of one": base(strides=[2]),
    "stride of two": base(strides=(2, 2)),
    "stride of four": base(strides=[1, 2, 2, 1]),
    "stride None is 1": base(strides=None, output_shape=(2, 4, 5, 6)),
    "stride a whole float": base(strides=2.0),
    "strides differ": base(strides=(3, 2), output_shape=(2, 12, 10, 6)),
    "output_shape of two": base(output_shape=(8, 10)),
    "output_shape a list": base(output_shape=[2, 7, 9, 6]),
    "data_format None": base(data_format=None),
    "padding VALID": base(padding="VALID", output_shape=(2, 9, 11, 6)),
    "padding VALID, largest": base(padding="VALID", output_shape=(2, 10, 12, 6)),
    "explicit top and right": base(padding=explicit(1, 0, 0, 1)),
    "explicit bottom and left": base(padding=explicit(0, 1, 1, 0)),
    "explicit unequal": base(padding=explicit(2, 0, 0, 2), output_shape=(2, 7, 9, 6)),
    "explicit zeros": base(padding=explicit(0, 0, 0, 0), output_shape=(2, 9, 12, 6)),
    "explicit tuples": base(padding=((0, 0), (1, 1), (2, 1), (0, 0)), output_shape=(2, 7, 8, 6)),
    "explicit beyond the kernel": base(padding=explicit(3, 3, 4, 0), output_shape=(2, 4, 8, 6)),
    "kernel larger than output": Call((2, 1, 1, 3), (7, 7, 2, 3), (2, 1, 1, 2), 1),
    "kernel larger than output, stride 2": Call((2, 1, 1, 3), (7, 7, 2, 3), (2, 2, 1, 2), 2),
    "kernel smaller than stride": Call(X, (1, 2, 2, 3), (2, 16, 18, 2), 4),
    "NCHW": base(x=NX, output_shape=NY, data_format="NCHW"),
    "NCHW, strides of four": base(x=NX, output_shape=NY, data_format="NCHW", strides=[1, 1, 2, 2]),
    "NCHW, explicit": base(
        x=NX, output_shape=NY, data_format="NCHW", padding=[[0, 0], [0, 0], [1, 0], [0, 1]]
    ),
    "NCHW, dilated": base(x=NX, output_shape=NY, data_format="NCHW", dilations=[1, 1, 2, 3]),
    "dilation": base(strides=1, dilations=2, output_shape=(2, 4, 5, 6)),
    "dilation and stride": base(dilations=2),
    "dilation of four": base(dilations=[1, 2, 3, 1]),
    "dilations differ": base(dilations=(3, 1), padding="VALID", output_shape=(2, 13, 11, 6)),
    "groups, depthwise": base(filters=(3, 3, 2, 3)),
    "groups, two": Call((1, 3, 4, 6), (3, 3, 4, 6), (1, 6, 8, 8), 2),
    "one channel": Call((2, 4, 5, 1), (3, 3, 1, 1), (2, 8, 10, 1), 2),
    "no samples": base(x=(0, 4, 5, 3), output_shape=(0, 8, 10, 6)),
    "no rows": base(x=(2, 0, 5, 3), output_shape=(2, 0, 10, 6)),
    "no input channels": base(x=(2, 4, 5, 0), filters=(3, 3, 6, 0)),
    "float16": Call((1, 3, 4, 2), (3, 3, 3, 2), (1, 6, 8, 3), 2, dtype="float16"),
    "bfloat16": Call((1, 3, 4, 2), (3, 3, 3, 2), (1, 6, 8, 3), 2, dtype="bfloat16"),
    "float64": base(dtype="float64"),
    "int32": base(dtype="int32"),
}

#: Calls that it takes nowhere.
REFUSED = {
    "output_shape too small": base(output_shape=(2, 6, 10, 6)),
    "output_shape too large": base(output_shape=(2, 8, 11, 6)),
    "output_shape of another batch": base(output_shape=(3, 8, 10, 6)),
    "output_shape of other channels": base(output_shape=(2, 8, 10, 5)),
    "output_shape, groups do not divide": base(output_shape=(2, 8, 10, 12)),
    "output_shape of three": base(output_shape=(2, 8, 10)),
    "output_shape of five": base(output_shape=(1, 2, 8, 10, 6)),
    "output_shape with -1": base(output_shape=(-1, 8, 10, 6)),
    "output_shape with None": base(output_shape=(None, 8, 10, 6)),
    "output_shape of floats": base(output_shape=(2.0, 8.0, 10.0, 6.0)),
    "output_shape None": base(output_shape=None),
    "strides in batch": base(strides=[2, 2, 2, 1]),
    "strides in channels": base(strides=[1, 2, 2, 2]),
    "strides of three": base(strides=[2, 2, 1]),
    "strides empty": base(strides=[]),
    "strides 0": base(strides=0),
    "strides negative": base(strides=(2, -1)),
    "strides a string": base(strides="22"),
    "dilations in batch": base(dilations=[2, 1, 1, 1]),
    "dilations 0": base(dilations=0),
    "dilations of three": base(dilations=[1, 1, 1]),
    "padding in lower case": base(padding="same"),
    "padding EXPLICIT": base(padding="EXPLICIT"),
    "padding None": base(padding=None),
    "padding an int": base(padding=1),
    "padding of two pairs": base(padding=[[1, 0], [0, 1]]),
    "padding of ints": base(padding=[0, 1, 1, 0]),
    "padding of triples": base(padding=[[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]),
    "padding negative": base(padding=explicit(-1, 0, 0, 1), output_shape=(2, 10, 10, 6)),
    "padding in batch": base(padding=[[1, 0], [1, 0], [0, 1], [0, 0]]),
    "padding too large": base(padding=explicit(5, 5, 0, 1)),
    "data_format in lower case": base(data_format="nhwc"),
    "data_format NCHW_VECT_C": base(data_format="NCHW_VECT_C"),
    "filters of other channels": base(filters=(3, 3, 6, 4)),
    "filters transposed": base(filters=(3, 3, 3, 6)),
    "filters of three dimensions": base(filters=(3, 6, 3)),
    "filters without outputs": base(filters=(3, 3, 0, 3), output_shape=(2, 8, 10, 0)),
    "input without batch": base(x=(4, 5, 3), output_shape=(8, 10, 6)),
    "input of five dimensions": base(x=(1, 2, 4, 5, 3), output_shape=(1, 2, 8, 10, 6)),
    "complex64": base(dtype="complex64"),
    "int64": base(dtype="int64"),
}

CALLS = dict(sweep()) | TAKEN | REFUSED


def keras_layers() -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(name, spatial dimensions, arguments)."""
    for k, s, padding in itertools.product((1, 2, 3, 4, 5), (1, 2, 3), ("same", "valid")):
        for extra in (None, *range(s)):
            arguments = dict(kernel_size=(k, 3), strides=(s, 1), padding=padding)
            if extra is not None:
                arguments["output_padding"] = (extra, 0)
            yield f"k{k} s{s} {padding} output_padding {extra}", 2, arguments
    for padding in ("same", "valid"):
        yield f"dilated {padding}", 2, dict(kernel_size=3, dilation_rate=(2, 3), padding=padding)
        yield (
            f"no bias {padding}",
            2,
            dict(kernel_size=3, strides=2, padding=padding, use_bias=False),
        )
        yield f"1-D {padding}", 1, dict(kernel_size=3, strides=2, padding=padding)
        yield f"1-D even {padding}", 1, dict(kernel_size=4, strides=3, padding=padding)


KERAS_X, KERAS_FILTERS = (2, 4, 5, 2), 3


# --- with TensorFlow -----------------------------------------------------------------------------


def answer(call: Call) -> Array | None:
    """y and, if it has some, gradients of input and filters, flat in a row; None if refused."""
    import tensorflow as tf

    x, w = (tf.cast(tf.constant(a), call.dtype) for a in call.operands())

    def run(x: Any, w: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch([x, w])
            y = tf.nn.conv2d_transpose(x, w, **call.keywords)
            dy = tf.cast(tf.constant(pattern(tuple(y.shape), 3, 2)), call.dtype)
        if not call.has_gradients:
            return [y]
        return [y, *tape.gradient(y, [x, w], dy, unconnected_gradients="zero")]

    for function in (run, tf.function(run, jit_compile=True)):
        try:
            results = function(x, w)
        except (ValueError, TypeError, tf.errors.OpError):
            continue
        flat = np.concatenate([tf.cast(r, "float64").numpy().ravel() for r in results])
        assert (flat == np.rint(flat)).all() and abs(flat).max(initial=0) < 2**15, (call, flat)
        return flat.astype(np.int16)
    return None


def keras_answer(dims: int, arguments: dict[str, Any]) -> tuple[dict[str, Any], Array | None]:
    """The layer's configuration, and its output, flat, or None if TensorFlow refuses."""
    import keras
    import tensorflow as tf

    cls = keras.layers.Conv2DTranspose if dims == 2 else keras.layers.Conv1DTranspose
    layer = cls(KERAS_FILTERS, name="layer", **arguments)
    x = pattern(KERAS_X if dims == 2 else KERAS_X[1:], 1).astype("float32")
    layer.build(x.shape)
    layer.set_weights([pattern(tuple(w.shape), 2 + i) for i, w in enumerate(layer.weights)])
    config = json.loads(json.dumps(layer.get_config()))
    for function in (layer, tf.function(layer, jit_compile=True)):
        try:
            return config, function(x).numpy().ravel().astype(np.int16)
        except (ValueError, TypeError, tf.errors.OpError):
            continue
    return config, None


def compute() -> dict[str, Array]:
    import keras
    import tensorflow as tf

    results, configs = {}, {}
    for name, call in CALLS.items():
        if (result := answer(call)) is not None:
            results[name] = result
    for name, dims, arguments in keras_layers():
        configs[name], result = keras_answer(dims, arguments)
        if result is not None:
            results[f"keras {name}"] = result
    results["keras configurations"] = np.array(json.dumps(configs))
    results["versions"] = np.array(f"tensorflow {tf.__version__}, keras {keras.__version__}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the file")
    check = parser.parse_args().check
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    results = compute()
    if not check:
        FILE.parent.mkdir(exist_ok=True)
        np.savez_compressed(FILE, **results)
        print(f"{len(results)} results of {results['versions']}: {FILE.stat().st_size} bytes")
        return 0
    with np.load(FILE) as committed:
        names = (committed.keys() | results.keys()) - {"versions", "keras configurations"}
        different = [
            name
            for name in sorted(names)
            if name not in committed
            or name not in results
            or not np.array_equal(committed[name], results[name])
        ]
    print(f"{len(names) - len(different)} of {len(names)} results as committed")
    print(*different, sep="\n")
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main())
