"""A throw-away copy of this project whose C++ is a few lines, so that it is built in seconds.

What is tested with it is how sources are found, compiled, kept, loaded and installed.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import deconv_ext

ROOT = Path(deconv_ext.__file__).resolve().parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")

BINDINGS = """
#include <Python.h>

int answer();

static PyObject* number(PyObject*, PyObject*) { return PyLong_FromLong(answer()); }
static PyObject* isa(PyObject*, PyObject*) { return Py_BuildValue("s", "portable"); }
static PyObject* isas(PyObject*, PyObject*) { return Py_BuildValue("(s)", "portable"); }
static PyMethodDef kMethods[] = {
    {"answer", number, METH_NOARGS, ""},
    {"cpu_isa", isa, METH_NOARGS, ""},
    {"cpu_isas", isas, METH_NOARGS, ""},
    {}};
static PyModuleDef kModule = {PyModuleDef_HEAD_INIT, "_C", "", -1, kMethods};

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&kModule); }
"""
ANSWER = '#include "answer.h"\nint answer() { return kAnswer; }\n'
KERNEL = "__global__ void kernel() {}\n"


class Project:
    """A copy in `directory`/check out, with a cache of its own; both names hold a space."""

    def __init__(self, directory: Path):
        self.root = directory / "check out"
        self.cache = directory / "the cache"
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / "deconv_ext", self.root / "deconv_ext", ignore=ignored)
        for name in FILES:
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, self.root)
        self.write("bindings.cpp", BINDINGS)
        self.write("answer.cpp", ANSWER)
        self.write("answer.h", "constexpr int kAnswer = 1;\n")
        self.write("cuda/kernel.cu", KERNEL)
        self.env = {k: v for k, v in os.environ.items() if k not in UNSET}
        self.env |= {"DECONV_EXT_CACHE": str(self.cache), "DECONV_EXT_CUDA": "0"}

    def write(self, name: str, text: str) -> Path:
        path = self.root / "csrc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def start(self, code: str, **env: str | None) -> "subprocess.Popen[str]":
        """Python in a process group of its own, in the checkout; None unsets a variable."""
        merged = {k: v for k, v in {**self.env, **env}.items() if v is not None}
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.root,
            env=merged,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, code: str, **env: str | None) -> tuple[str, str]:
        """What `code` prints on stdout and on stderr; it must not fail."""
        process = self.start(code, **env)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return out.strip(), err

    def answer(self, **env: str | None) -> tuple[int, Path, str]:
        """The number from the binary module, its library, and what was printed on stderr."""
        out, err = self.run(LOAD, **env)
        number, path = json.loads(out)
        return number, Path(path), err


LOAD = """
import json
from deconv_ext.build import extension
print(json.dumps([extension().answer(), extension().__file__]))
"""
# What would change the place or the making of the library.
UNSET = (
    *("DECONV_EXT_CACHE", "DECONV_EXT_CUDA", "DECONV_EXT_CPU_ISA", "TORCH_EXTENSIONS_DIR"),
    *("TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CXX", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH"),
)


def script(path: Path, text: str) -> Path:
    """An executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
