"""`_C.pyi` says of the binary module what there is: its functions, their arguments and defaults."""

import ast
import re
from pathlib import Path

import pytest

import deconv_ext
from deconv_ext.build import extension

STUB = ast.parse((Path(deconv_ext.__file__).parent / "_C.pyi").read_text())
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def test_the_stub_has_every_function_and_no_other():
    assert set(FUNCTIONS) == {name for name in dir(extension()) if not name.startswith("__")}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_and_defaults(name):
    stub = FUNCTIONS[name].args
    names = [argument.arg for argument in stub.args]
    defaults = [repr(ast.literal_eval(value)) for value in stub.defaults]
    defaults = [""] * (len(names) - len(defaults)) + defaults
    assert list(zip(names, defaults, strict=True)) == signature(getattr(extension(), name))


def signature(function):
    """(name, default or "") of each argument, as pybind11 writes them in the docstring:
    f(x: torch.Tensor, size: Annotated[Sequence[int], "FixedSize(2)"], algo: str = 'auto') -> ..."""
    text = function.__doc__.splitlines()[0]
    while (shorter := re.sub(r"\[[^\[\]]*\]", "", text)) != text:
        text = shorter
    arguments = text[text.index("(") + 1 : text.index(") ->")]
    return re.findall(r"(\w+): [^,=]+(?:= ([^,]+))?", arguments)
