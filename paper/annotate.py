"""The code under the formulas of EQUATIONS.md, taken from the source.

    python -m paper.annotate            put today's code into every block
    python -m paper.annotate --check    name the blocks that are stale, and change nothing

A block is a fence of Python whose first line names a function, `# sde.py: sage_variance`. What follows is that function
without its docstring, which the text around the block replaces. tests/test_equations.py runs the check.
"""

import argparse
import ast
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "EQUATIONS.md"
BLOCK = re.compile(r"^```python\n# (?P<file>[\w/]+\.py): (?P<name>[\w.]+)\n(?P<code>.*?)^```$", re.M | re.S)


def function_without_docstring(file, name):
    """The source lines of a function or method, from `def` on, at the left margin."""
    source = (ROOT / file).read_text(encoding="utf-8")
    node = ast.parse(source)
    for part in name.split("."):
        (node,) = [child for child in node.body if getattr(child, "name", None) == part]
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        del lines[docstring.lineno - node.lineno : docstring.end_lineno - node.lineno + 1]
    return textwrap.dedent("\n".join(lines)) + "\n"


def stale_blocks(text):
    """["sde.py: score", …]: the blocks that differ from the source."""
    stale = []
    for block in BLOCK.finditer(text):
        if block["code"] != function_without_docstring(block["file"], block["name"]):
            stale.append(f"{block['file']}: {block['name']}")
    return stale


def annotated(text):
    """The page with today's code in every block."""

    def today(block):
        code = function_without_docstring(block["file"], block["name"])
        return f"```python\n# {block['file']}: {block['name']}\n{code}```"

    return BLOCK.sub(today, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a block is stale")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    stale = stale_blocks(text)
    for name in stale:
        print(f"{PAGE.name}: {'stale' if options.check else 'renewed'}: {name}")
    if not options.check:
        PAGE.write_text(annotated(text), encoding="utf-8")
    sys.exit(bool(stale and options.check))


if __name__ == "__main__":
    main()
