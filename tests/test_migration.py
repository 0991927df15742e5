"""docs/migration.md: its code blocks run, in order, as one program."""

import re

from project import ROOT

GUIDE = ROOT / "docs" / "migration.md"


def test_code_blocks_run(capsys):
    text = GUIDE.read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("```") / 2 >= 6
    names: dict = {}
    for block in blocks:
        assert "assert" in block
        # Line numbers as in the page, for a traceback that leads there.
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, str(GUIDE), "exec"), names)
    printed = capsys.readouterr().out
    assert "2 of 2 layers converted" in printed and "1 of 2 layers fused" in printed
