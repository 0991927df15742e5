"""README.md and docs/: what they show runs, and what they name is there.

The code blocks of a page run in order, as one program, in an empty folder:

* ```python runs. With title="name.py" it is written to that file instead, for what comes after it.
* ```sh holds commands, one a line: see `run_command`, which knows what may stand there.
* ```text is output.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import deconv_ext
from deconv_ext.__main__ import main
from project import ROOT

if sys.version_info >= (3, 11):
    import tomllib

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r'^```(\w*)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
SLOW = {"docs/recipes.md"}  # Inductor compiles


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def pages_with_code() -> Iterator[Any]:
    for page in PAGES:
        if "```" in page.read_text():
            name = name_of(page)
            yield pytest.param(page, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("page", list(pages_with_code()))
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    text, names = page.read_text(), {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == len(re.findall(r"^\s*```", text, re.MULTILINE)) / 2, "a block was missed"
    for block in blocks:
        kind, title, code = block.groups()
        assert kind in ("python", "sh", "text"), f"what to do with a block of {kind!r}?"
        if title:
            Path(title).write_text(code)
        elif kind == "python":
            # Line numbers as in the page, for a traceback that leads there.
            line = text[: block.start(3)].count("\n")
            exec(compile("\n" * line + code, str(page), "exec"), names)
        elif kind == "sh":
            for command in code.splitlines():
                run_command(shlex.split(command), monkeypatch)


class Parsed(Exception):
    """The arguments are right; what would follow takes long."""


DONE: set[tuple[str, ...]] = set()  # by an earlier page


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run it if it is quick, else see that it could run."""
    if words[:3] == ["python", "-m", "deconv_ext"]:
        command = words[3:]
        if command[0] in ("bench", "demo"):
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr("argparse.ArgumentParser.parse_args", parse_and_stop)
                main(command)
        elif tuple(command) not in DONE:
            assert main(command) == 0
            DONE.add(tuple(command))
    elif words[:4] == ["python", "-m", "pip", "install"]:
        for word in words[4:]:
            for extra in re.findall(r"\[(.*)\]", word):
                assert set(extra.split(",")) <= extras(), word
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), words[1]
    elif words[0] == "make":
        dry = subprocess.run(
            ["make", "-n", "-C", str(ROOT), *words[1:]], capture_output=True, text=True
        )
        assert dry.returncode == 0, dry.stderr
    elif words[0] == "torchrun":  # as the only process of a group; test_distributed starts two
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
        with monkeypatch.context() as patch:
            for name, value in alone.items():
                patch.setenv(name, value)
            runpy.run_path(words[-1], run_name="__main__")
    else:
        assert words[:2] in (["git", "clone"], ["cd", "deconv_ext"]), f"teach me {words}"


def parse_and_stop(parser: Any, arguments: Any = None) -> None:
    _, rest = parser.parse_known_args(arguments)
    assert not rest, f"unrecognized arguments: {rest}"
    raise Parsed


def extras() -> set[str]:
    if sys.version_info < (3, 11):
        pytest.skip("pyproject.toml is read with tomllib, of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


# --- what pages name ------------------------------------------------------------------------------


def test_files_that_the_readme_names_are_there() -> None:
    """Links; MkDocs looks after those of the other pages. And the tests of the support table."""
    text = (ROOT / "README.md").read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text)]
    paths = [link for link in links if "://" not in link]
    tests = re.findall(r"`(test_\w+)`", text)
    assert len(paths) > 5 and len(tests) > 20
    for path in [*paths, *(f"tests/{name}.py" for name in tests)]:
        assert (ROOT / path).exists(), path


def test_the_reference_has_every_command_and_option(capsys: pytest.CaptureFixture) -> None:
    def options_of(command: list[str]) -> str:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        return capsys.readouterr().out

    commands = re.search(r"\{([\w,]+)\}", options_of([]))
    assert commands
    page = (ROOT / "docs/reference/cli.md").read_text()
    helps = "".join(options_of([command]) for command in commands[1].split(","))
    options = set(re.findall(r"--[a-z][a-z-]*", helps))
    assert set(re.findall(r"--[a-z][a-z-]*", page)) == options
    for command in commands[1].split(","):
        assert re.search(rf"^\| `{command}[ `]", page, re.MULTILINE), command


def test_the_reference_has_every_variable() -> None:
    pattern, sources = r"DECONV_EXT_[A-Z_]+", [*(ROOT / "deconv_ext").glob("*.py")]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    read = {name for path in sources for name in re.findall(pattern, path.read_text())}
    told = re.findall(rf"^\| `({pattern})`", (ROOT / "docs/reference/cli.md").read_text(), re.M)
    assert set(told) == read
    for page in PAGES:
        assert set(re.findall(pattern, page.read_text())) <= read, page


def test_the_reference_has_the_whole_interface() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    entries = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    for name in deconv_ext.__all__:
        member = getattr(deconv_ext, name)
        within = {f"deconv_ext.{name}", getattr(member, "__module__", "")}
        assert name in ("__version__", "functional") or within & entries, name
    for entry in entries:
        module, _, name = entry.rpartition(".")
        member = getattr(importlib.import_module(module), name, None)
        check_arguments(member or importlib.import_module(entry))


def check_arguments(target: Any) -> None:
    """What a docstring says of arguments, it says of arguments that there are."""
    if inspect.ismodule(target):
        for name, member in vars(target).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                check_arguments(member)
        return
    section = re.search(r"^ *Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(target) or "", re.M | re.S)
    listed = re.findall(r"^    (\w[\w, ]*):", section[1], re.MULTILINE) if section else []
    parameters = inspect.signature(target).parameters
    for name in (name for names in listed for name in names.split(", ")):
        assert name in parameters, f"{target.__qualname__} has no argument {name}"


def test_messages_of_the_troubleshooting_page_are_real() -> None:
    """`…` stands for what a message fills in."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    told = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(told) > 12
    texts = "\n".join(
        text for path in (ROOT / "deconv_ext").glob("*.py") for text in strings(path.read_text())
    )
    for message in told:
        assert message.strip("…") in texts, message


def strings(source: str) -> Iterator[str]:
    """The string literals of a program, with … for what an f-string fills in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_figure_of_the_shifted_pixel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    example = runpy.run_path(str(ROOT / "examples/same_padding.py"))
    assert example["main"](["--output", str(tmp_path)]) == 0
    assert (tmp_path / "same_padding.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert re.search(r"TensorFlow: SAME +outputs 0 to 5", printed)
    assert re.search(r"torch: padding=1, +outputs 1 to 6", printed)
