"""The binary module is built once for what it depends on, and a bad one is never loaded."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deconv_ext import build, compiler, doctor, toolchain
from project import LOAD, ROOT, Project, script

BUILDING = "deconv_ext: building for torch"
slow = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("built"))
    number, _, err = project.answer()
    assert number == 1 and err.count(BUILDING) == 1, err
    shutil.copytree(project.cache, project.cache.with_name("as built"))
    return project


@pytest.fixture
def built(built_once: Project) -> Project:
    """A project with a library in its cache, and nothing in the package."""
    shutil.rmtree(built_once.cache)
    shutil.copytree(built_once.cache.with_name("as built"), built_once.cache)
    for library in (built_once.root / "deconv_ext").glob("*.so"):
        library.unlink()
    return built_once


def test_import_neither_compiles_nor_loads(project: Project):
    out, err = project.run(
        "import deconv_ext, sys; print('deconv_ext._C' in sys.modules)", PATH="/nonexistent"
    )
    assert (out, err) == ("False", "") and not project.cache.exists()


def test_what_is_built_is_found_again(built: Project):
    number, library, err = built.answer()
    assert number == 1 and built.cache in library.parents and err == ""


def test_build_info_compiles_nothing(built: Project, tmp_path: Path):
    code = "import deconv_ext, json; print(json.dumps(deconv_ext.build_info()))"
    out, err = built.run(code, DECONV_EXT_CACHE=str(tmp_path / "empty"))
    info = json.loads(out)
    assert info["built"] == "not built yet" and info["path"] is None and err == ""
    assert not (tmp_path / "empty").exists()
    info = json.loads(built.run(code)[0])
    assert info["built"] == "jit" and built.cache in Path(info["path"]).parents
    assert info["torch"] == torch.__version__ and info["cpu_isa"] == "portable"
    assert "no CUDA: DECONV_EXT_CUDA=0" in info["notes"]


def test_every_fact_makes_a_library_of_its_own():
    plan = compiler.plan()
    assert set(plan.facts) == {
        *("torch", "cxx11_abi", "python", "machine", "cxx", "nvcc", "cuda_archs"),
    }
    places = {compiler._places(plan.facts, Path("cache"))[0]}
    for fact in plan.facts:
        places.add(compiler._places({**plan.facts, fact: "another"}, Path("cache"))[0])
    assert len(places) == 1 + len(plan.facts)


def test_compiled_files_have_different_names():
    """torch names the object files of all directories after the source alone."""
    names = [path.name for path in compiler.source_files(compiled=True)]
    assert "bindings.cpp" in names and len(names) == len(set(names))
    assert not [p for p in compiler.source_files(with_cuda=False) if "cuda" in p.parts]


@slow
def test_only_what_changed_is_compiled_again(project: Project):
    assert project.answer()[0] == 1
    before = {path: path.stat().st_mtime_ns for path in project.cache.glob("*/*.o")}
    project.write("answer.h", "constexpr int kAnswer = 2;\n")
    number, library, err = project.answer()
    assert number == 2 and err.count(BUILDING) == 1
    assert [p.name for p in before if p.stat().st_mtime_ns != before[p]] == ["answer.o"]
    project.write("answer.h", "constexpr int kAnswer = 1;\n")
    assert project.answer()[::2] == (1, ""), "the library of the first sources is still there"


@slow
def test_a_source_that_became_older_is_compiled_again(project: Project):
    assert project.answer()[0] == 1
    header = project.write("answer.h", "constexpr int kAnswer = 3;\n")
    os.utime(header, (1e9, 1e9))
    assert project.answer()[0] == 3


def _truncated(library: bytes) -> bytes:
    return library[: len(library) // 2]


def _zeroed(library: bytes) -> bytes:
    return library[:4096] + bytes(4096) + library[8192:]


def _foreign(library: bytes) -> bytes:
    other = f'"torch": "0.{torch.__version__}"'.encode()
    return library.replace(f'"torch": "{torch.__version__}"'.encode(), other)


def _unloadable(library: bytes) -> bytes:
    """Whole by its record, but not a library."""
    code, _, record = library.rpartition(compiler.RECORD_MARK)
    return compiler.with_record(b"not " + code, json.loads(record))


@pytest.mark.parametrize("damage", (_truncated, _zeroed, _foreign, _unloadable, lambda _: b""))
@pytest.mark.parametrize("where", ("cache", "package"))
@slow
def test_a_bad_library_is_rebuilt(built: Project, damage, where: str):
    library = next(built.cache.glob("*/_C-*.so"))
    bad = damage(library.read_bytes())
    if where == "package":
        library = built.root / "deconv_ext" / compiler.prebuilt_path().name
    library.write_bytes(bad)
    number, loaded, err = built.answer()
    assert number == 1 and (BUILDING in err if where == "cache" else err == ""), err
    assert built.cache in loaded.parents and compiler.read_record(loaded)
    if where == "cache":
        assert built.answer()[2] == "", "and kept"


@slow
def test_processes_wait_for_one_build(project: Project):
    processes = [project.start(LOAD) for _ in range(3)]
    results = [process.communicate(timeout=300) for process in processes]
    assert [json.loads(out)[0] for out, _ in results] == [1, 1, 1]
    messages = "".join(err for _, err in results)
    assert messages.count(BUILDING) == 1 and messages.count("waiting for the build") == 2


@slow
@pytest.mark.parametrize("whole_group", (True, False))
def test_a_killed_build_blocks_nobody(project: Project, whole_group: bool):
    process = project.start(LOAD)
    _wait_for(lambda: list(project.cache.glob("*/build.ninja")))
    kill = os.killpg if whole_group else os.kill
    kill(process.pid, signal.SIGKILL)
    process.communicate()
    (next(project.cache.glob("*")) / "lock").touch()  # as an older torch leaves it
    assert project.answer()[0] == 1


def _wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@slow
def test_a_directory_that_cannot_be_written_is_passed_over(project: Project, tmp_path: Path):
    env = {"HOME": "/dev/null", "XDG_CACHE_HOME": None, "DECONV_EXT_CACHE": None}
    number, library, _ = project.answer(**env, TMPDIR=str(tmp_path))
    assert number == 1 and tmp_path / f"deconv_ext-{os.getuid()}" in library.parents


def test_the_cache_of_another_user_is_not_trusted(monkeypatch, tmp_path: Path):
    other = os.getuid() + 1
    for user in (other, other - 1):
        (tmp_path / f"deconv_ext-{user}").mkdir()  # both made by this user
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path))
    assert tmp_path / f"deconv_ext-{other - 1}" in compiler.cache_dirs()
    monkeypatch.setattr(compiler.os, "getuid", lambda: other)
    assert not [path for path in compiler.cache_dirs() if tmp_path in path.parents]


def _fails(project: Project, **env: str | None) -> str:
    """The message of the `BuildError` that loading raises."""
    code = f"from deconv_ext.build import BuildError\ntry:{LOAD}\nexcept BuildError as e: print(e)"
    return project.run(code.replace(LOAD, LOAD.replace("\n", "\n  ")), **env)[0]


def test_without_a_compiler_the_message_says_what_to_install(project: Project, tmp_path: Path):
    message = _fails(project, PATH=str(tmp_path))
    assert re.search("there is no C\\+\\+ compiler; to mend it: .*install.* (g|gcc-c|gx)", message)


def test_without_a_compiler_what_was_built_is_used(built: Project, tmp_path: Path):
    assert built.answer(PATH=str(tmp_path))[::2] == (1, "")


def test_a_compiler_that_does_not_run_is_named(project: Project):
    message = _fails(project, CXX="/nonexistent/g++")
    assert "CXX=/nonexistent/g++ does not run; to mend it: unset CXX" in message


@slow
def test_ninja_is_found_outside_of_the_path(project: Project, tmp_path: Path):
    for name in ("c++", "as", "ld", "sh"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    assert project.answer(PATH=str(tmp_path))[0] == 1


@slow
def test_an_error_in_a_source_is_shown(project: Project):
    project.write("answer.cpp", "int answer() { return undeclared; }\n")
    message = _fails(project)
    assert "answer.cpp:1:" in message and "undeclared" in message
    log = re.search("see (.*/build.log)", message)
    assert log and Path(log[1]).is_file()


def test_processes_are_capped_by_memory(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(toolchain.os, "sched_getaffinity", lambda _: range(64))
    files = {"/proc/meminfo": "MemAvailable:   10000000 kB\n"}
    monkeypatch.setattr(toolchain, "read_text", lambda path: files.get(path, ""))
    assert toolchain.jobs() == 4
    files["/sys/fs/cgroup/memory.max"] = "6000000000\n"
    files["/sys/fs/cgroup/memory.current"] = "900000000\n"
    assert toolchain.jobs() == 2
    files["/proc/meminfo"] = "MemAvailable:   1000 kB\n"
    assert toolchain.jobs() == 1
    monkeypatch.setenv("MAX_JOBS", "7")
    assert toolchain.jobs() == 7


# ---- CUDA ----------------------------------------------------------------------------------------


def _toolkit(home: Path, version: str = "13.0", compiles: str = "true") -> Path:
    """A pretended CUDA toolkit; its nvcc runs `compiles` when it is given a source."""
    (home / "include").mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    nvcc = f"""case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
--dryrun) echo '#$ TOP={home}/bin/..' >&2 ;;
--list-gpu-code) printf 'sm_80\\nsm_86\\nsm_90a\\n' ;;
*) {compiles} ;;
esac"""
    return script(home / "bin/nvcc", nvcc)


@pytest.fixture
def no_toolkits(monkeypatch, tmp_path: Path) -> None:
    """None but those that the test makes; PATH begins with tmp_path/bin."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    real = toolchain._toolkit_of
    pretended = lambda nvcc: real(nvcc) if nvcc.startswith(str(tmp_path)) else None  # noqa: E731
    monkeypatch.setattr(toolchain, "_toolkit_of", pretended)


def test_a_wrapper_named_nvcc_is_resolved(no_toolkits, tmp_path: Path):
    real = _toolkit(tmp_path / "opt/cuda toolkit")
    script(tmp_path / "bin/nvcc", f'exec "{real}" "$@"')
    toolkit, why = toolchain.find_toolkit("13.2")
    assert toolkit == (str(tmp_path / "opt/cuda toolkit"), "13.0") and why == ""


def test_a_toolkit_of_another_major_version_is_not_used(no_toolkits, monkeypatch, tmp_path: Path):
    why = toolchain.find_toolkit("13.2")[1]
    assert "no usable nvcc of CUDA 13; to mend it: " in why
    assert 'pip install "cuda-toolkit[nvcc,cccl]==13.2.*"' in why
    assert "to mend it: export CUDA_HOME=" in toolchain.find_toolkit("12.8")[1]
    _toolkit(tmp_path / "12", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "12"))
    toolkit, why = toolchain.find_toolkit("13.2")
    assert toolkit is None and "is of CUDA 12.8, torch is of CUDA 13.2" in why
    _toolkit(tmp_path / "13", "13.1")
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "13"))
    assert toolchain.find_toolkit("13.2")[0] == (str(tmp_path / "13"), "13.1")


def test_a_toolkit_without_the_runtime_links_with_that_of_torch(tmp_path: Path):
    toolkit = toolchain.Toolkit(str(tmp_path), "13.0")
    flags = toolchain.cuda_link_flags(toolkit, tmp_path)
    assert flags == [f"-L{tmp_path}"]
    runtime = tmp_path / "libcudart.so"
    assert runtime.is_symlink() == bool(torch.version.cuda)
    assert "libcudart" in runtime.resolve().name
    (tmp_path / "lib64").mkdir()
    (tmp_path / "lib64/libcudart.so").touch()
    assert toolchain.cuda_link_flags(toolkit, tmp_path) == []


def test_a_toolkit_without_headers_is_not_used(no_toolkits, monkeypatch, tmp_path: Path):
    _toolkit(tmp_path / "13")
    (tmp_path / "13/include/cuda_runtime.h").unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "13"))
    assert toolchain.find_toolkit("13.2")[0] is None


def test_architectures(no_toolkits, monkeypatch, tmp_path: Path):
    home = tmp_path / "13"
    _toolkit(home)
    toolkit = toolchain.Toolkit(str(home), "13.0")
    usual = ["sm_80", "compute_80", "sm_90a"]
    assert toolchain.cuda_archs(toolkit, portable=False) == usual
    script(tmp_path / "bin/nvidia-smi", "printf '9.0\\n8.6\\n9.0\\n'")
    assert toolchain.cuda_archs(toolkit, portable=False) == ["sm_86", "sm_90a"]
    assert toolchain.cuda_archs(toolkit, portable=True) == usual
    script(tmp_path / "bin/nvidia-smi", "echo 12.1")  # newer than this nvcc
    assert toolchain.cuda_archs(toolkit, portable=False) == usual
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert toolchain.cuda_archs(toolkit, portable=False) == ["8.0", "9.0a+PTX"]
    assert toolchain.gencode_flags(["8.0", "9.0a+PTX"]) == []
    assert toolchain.gencode_flags(usual) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
        "-gencode=arch=compute_90a,code=sm_90a",
    ]


@slow
def test_without_a_usable_nvcc_the_library_is_for_the_cpu(project: Project, tmp_path: Path):
    _toolkit(tmp_path / "cuda", "13.0", "echo 'fatal: host compiler is too new'; exit 1")
    code = "import torch; torch.version.cuda = '13.0'" + LOAD
    code += "from deconv_ext import build_info; print(build_info()['notes'])"
    env = {"CUDA_HOME": str(tmp_path / "cuda"), "DECONV_EXT_CUDA": "auto"}
    for times in (1, 0):
        out, err = project.run(code, **env)
        assert json.loads(out.splitlines()[0])[0] == 1
        assert err.count(BUILDING) == times and "host compiler is too new" in out
    code = code.replace(LOAD, "\nfrom deconv_ext import build\nbuild.extension()\n")
    process = project.start(code, **{**env, "DECONV_EXT_CUDA": "1"})
    err = process.communicate()[1]
    assert process.returncode and "DECONV_EXT_CUDA=1, but nvcc cannot be used" in err


def test_cuda_can_be_demanded_and_forbidden(monkeypatch):
    monkeypatch.setenv("DECONV_EXT_CUDA", "0")
    assert compiler.cuda_toolkit() == (None, "DECONV_EXT_CUDA=0")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("DECONV_EXT_CUDA", "1")
    with pytest.raises(build.BuildError, match="DECONV_EXT_CUDA=1, but torch is built without"):
        compiler.cuda_toolkit()
    monkeypatch.setenv("DECONV_EXT_CUDA", "yes")
    with pytest.raises(build.BuildError, match="DECONV_EXT_CUDA must be 0, 1 or auto, not 'yes'"):
        compiler.cuda_toolkit()


# ---- the real library ----------------------------------------------------------------------------


def test_cuda_kernels_are_there_wherever_they_can_be_built():
    extension, info = build.extension(), build.build_info()
    toolkit, why = compiler.cuda_toolkit()
    assert extension.compiled()["with_cuda"] == bool(info["nvcc"]) == (toolkit is not None)
    if toolkit:
        archs = toolchain.cuda_archs(toolkit, portable=info["built"] == "aot")
        assert info["cuda_archs"] == archs == extension.compiled()["cuda_archs"].split()
    else:
        assert f"no CUDA: {why}" in info["notes"]


def _in_new_process(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_the_openmp_runtime_is_that_of_torch():
    code = """
import torch
from deconv_ext import build, toolchain
before = toolchain.openmp_runtimes()
extension = build.extension()
x, w = torch.randn(2, 8, 30, 30), torch.randn(8, 8, 3, 3)
extension.forward(x, w, None, (2, 2), (1, 1, 1, 1), (0, 0), (1, 1), 1)
print(len(before), before == toolchain.openmp_runtimes() == build.build_info()["openmp"])
"""
    assert _in_new_process("-c", code).stdout == "1 True\n"


def test_doctor_passes():
    process = _in_new_process("-m", "deconv_ext", "doctor")
    assert process.returncode == 0, process.stdout + process.stderr
    for word in (torch.__version__, "self-test passed", "bfloat16", "grad_weight", "OpenMP"):
        assert word in process.stdout


def test_doctor_fails_with_a_wrong_kernel(monkeypatch, capsys):
    right = doctor.functional.conv_transpose2d

    def wrong(input, weight, bias, **arguments):
        return right(input, weight, bias, **arguments) * 1.001

    monkeypatch.setattr(doctor.functional, "conv_transpose2d", wrong)
    assert doctor.main() == 1
    assert re.search(r"float32 +forward .* WRONG", capsys.readouterr().out)


def test_doctor_fails_without_a_library(project: Project, tmp_path: Path):
    code = "from deconv_ext.__main__ import main; print(main(['doctor']))"
    out, _ = project.run(code, PATH=str(tmp_path))
    assert out.splitlines()[-1] == "1" and "self-test FAILED" in out
    assert re.search("missing: there is no C\\+\\+ compiler; to mend it: .* install", out)


@slow
def test_build_command(project: Project):
    code = "from deconv_ext.__main__ import main; main(['build', *{}])"
    library = Path(project.run(code.format([]))[0])
    built_at = library.stat().st_mtime_ns
    assert project.run(code.format([])) == (str(library), "")
    assert library.stat().st_mtime_ns == built_at
    assert BUILDING in project.run(code.format(["--force"]))[1]
    assert library.stat().st_mtime_ns > built_at
