"""pip installs the package whatever is missing, and what it installs works."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from deconv_ext import compiler
from project import LOAD, UNSET, Project

pytestmark = pytest.mark.slow

DOCTOR = "import sys; from deconv_ext.__main__ import main; sys.exit(main(['doctor']))"


class Environment:
    """A virtual environment that sees the packages of this one, but not this checkout."""

    def __init__(self, directory: Path):
        self.root = directory / "virtual environment"
        command = [sys.executable, "-m", "venv", "--without-pip", str(self.root)]
        subprocess.run(command, check=True)
        self.python = self.root / "bin/python"
        self.site = next(self.root.glob("lib/python*/site-packages"))
        packages = [p for p in sys.path if p.endswith("-packages")]
        (self.site / "outer.pth").write_text("\n".join(packages))
        self.env = {k: v for k, v in os.environ.items() if k not in UNSET}
        self.env |= {"DECONV_EXT_CACHE": str(directory / "the cache"), "DECONV_EXT_CUDA": "0"}
        self.env["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        self.package = self.site / "deconv_ext"

    def run(self, *arguments: str, cwd: Path | None = None, **env: str) -> tuple[str, str]:
        """What python with `arguments` prints on stdout and on stderr; it must not fail."""
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.root,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip(), done.stderr

    def pip_install(self, project: Path, *options: str, **env: str) -> str:
        """What pip prints; `--ignore-installed`, for there may be one in the outer environment."""
        command = ("-m", "pip", "install", "-v", "--no-deps", "--ignore-installed")
        return "".join(self.run(*command, *options, str(project), **env))

    def binaries(self) -> list[str]:
        return [path.name for path in self.package.glob("*.so")]


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


BINARY = [compiler.prebuilt_path().name]


def test_without_isolation_the_binary_is_installed_until_sources_change(
    environment: Environment, project: Project
):
    environment.pip_install(project.root, "--no-build-isolation")
    assert environment.binaries() == BINARY
    out, err = environment.run("-c", LOAD, PATH="/nonexistent")  # needs no compiler any more
    assert out.startswith("[1, ") and str(environment.package) in out and err == ""
    info, _ = environment.run("-c", "import deconv_ext as d; print(d.build_info()['built'])")
    assert info == "aot"
    built, err = environment.run("-m", "deconv_ext", "build")
    assert built == str(environment.package / BINARY[0]) and err == "", "there is nothing to build"

    (environment.package / "csrc/answer.h").write_text("constexpr int kAnswer = 2;\n")
    out, err = environment.run("-c", LOAD)
    assert out.startswith("[2, ") and "the cache" in out and "building for torch" in err
    notes, _ = environment.run("-c", "import deconv_ext as d; print(d.build_info()['notes'])")
    assert f"{BINARY[0]} is not used: its source_hash is" in notes


def test_a_file_that_is_gone_is_not_installed_again(environment: Environment, project: Project):
    extra = project.write("extra.cpp", "")
    environment.pip_install(project.root, "--no-build-isolation")
    assert (environment.package / "csrc/extra.cpp").exists()
    extra.unlink()
    shutil.rmtree(environment.package)  # pip was told to ignore what is installed
    environment.pip_install(project.root, "--no-build-isolation")
    assert not (environment.package / "csrc/extra.cpp").exists()
    assert environment.run("-c", LOAD)[1] == "", "the binary is of the sources beside it"


def test_editable(environment: Environment, project: Project):
    environment.pip_install(project.root, "--no-build-isolation", "--editable")
    out, err = environment.run("-c", LOAD)
    assert str(project.root / "deconv_ext" / BINARY[0]) in out and err == ""
    project.write("answer.h", "constexpr int kAnswer = 4;\n")
    assert environment.run("-c", LOAD)[0].startswith("[4, ")


def test_with_isolation_it_is_built_at_first_use(environment: Environment, project: Project):
    printed = environment.pip_install(project.root)
    assert "No module named 'torch'" in printed and not environment.binaries()
    assert "Tag: py3-none-any" in next(environment.site.glob("deconv_ext*/WHEEL")).read_text()
    shutil.rmtree(project.root)
    out, err = environment.run("-c", LOAD)
    assert out.startswith("[1, ") and "the cache" in out and "building for torch" in err
    assert environment.run("-c", LOAD) == (out, "")


@pytest.mark.parametrize("editable", ((), ("--editable",)))
def test_without_a_compiler(environment: Environment, project: Project, editable):
    path = str(environment.root)
    printed = environment.pip_install(project.root, "--no-build-isolation", *editable, PATH=path)
    assert "installed without binary" in printed and "there is no C++ compiler" in printed
    assert environment.run("-c", "import deconv_ext", PATH=path) == ("", "")
    assert environment.run("-c", LOAD)[0].startswith("[1, "), "once there is a compiler"


def test_with_sources_that_do_not_compile(environment: Environment, project: Project):
    project.write("answer.cpp", "int answer() { return undeclared; }\n")
    printed = environment.pip_install(project.root, "--no-build-isolation")
    assert "installed without binary" in printed and "undeclared" in printed
    assert environment.run("-c", "import deconv_ext") == ("", "")
    assert not environment.binaries()


def test_distributions_hold_all_sources(environment: Environment, project: Project):
    code = "from setuptools import build_meta as b; b.build_sdist('dist')"
    environment.run("-c", code, cwd=project.root)
    sdist = next((project.root / "dist").iterdir())
    with tarfile.open(sdist) as archive:
        # Python learnt of filters within 3.10 and 3.11.
        if hasattr(tarfile, "data_filter"):
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(project.root / "unpacked")
    root = next((project.root / "unpacked").iterdir())
    for name in ("csrc/answer.h", "csrc/cuda/kernel.cu", "setup.py", "deconv_ext/py.typed"):
        assert (root / name).is_file()
    environment.run("-m", "pip", "wheel", "--no-deps", "-w", str(root), str(root))
    names = zipfile.ZipFile(next(root.glob("*.whl"))).namelist()
    for file in ("csrc/answer.h", "csrc/cuda/kernel.cu", "py.typed", "_C.pyi", "layers.csv"):
        assert f"deconv_ext/{file}" in names


def test_the_real_package_from_a_wheel(environment: Environment, tmp_path: Path):
    """The whole way of a user: isolated installation, first use, `doctor`."""
    project = Project(tmp_path)
    shutil.rmtree(project.root / "csrc")
    shutil.copytree(compiler.source_dir(), project.root / "csrc")
    environment.pip_install(project.root)
    out, err = environment.run("-c", DOCTOR)
    assert err.count("building for torch") == 1
    assert "self-test passed" in out and f"jit {tmp_path}/the cache" in out
