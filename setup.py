"""Puts the C++ sources into the package and, where torch and a compiler are there, the binary too.

Without them (build isolation hides torch) the installation is pure Python, and the binary module
is built at its first use from the sources in the package.
"""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


def can_compile():
    try:
        from deconv_ext import toolchain

        toolchain.require_tools()
    except Exception as error:  # whatever a missing, old or broken torch or compiler may raise
        _note(error)
        return False
    return True


def _note(error):
    print(
        f"deconv_ext: installed without binary, to be built at first use: {error}", file=sys.stderr
    )


class BuildPy(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "deconv_ext", "csrc")
            shutil.rmtree(target, ignore_errors=True)  # what an earlier version left
            shutil.copytree(ROOT / "csrc", target)


class BuildExt(build_ext):
    def build_extension(self, ext):
        from deconv_ext.compiler import BuildError, build

        try:
            library = build(cache=ROOT / "build" / "native")
        except BuildError as error:
            _note(error)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # another process may have it loaded
        shutil.copyfile(library, target)


setup(
    ext_modules=[Extension("deconv_ext._C", [], optional=True)] if can_compile() else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
)
