"""Counts the lines of code of core, parts and tests: `make size`.

A line counts that has more than blanks, comments and docstrings.
"""

import ast
import io
import sys
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


@cache
def num_code_lines(path: Path) -> int:
    """Return the number of lines that have more than blanks, comments and docstrings."""
    text = path.read_text(encoding="utf-8")
    tokens = [each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.type not in SILENT]
    lines = {line for each in tokens for line in range(each.start[0], each.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())) as docstring, *_]:
                    lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)


def names(path: Path) -> list[str]:
    """Return what a Python file counts for: a core or a part, sums of them, or the tests."""
    package, *folders = path.relative_to(ROOT).parts[:-1]
    if package == "tests":
        return [package]
    if folders[:1] == ["parts"] and folders[1:]:
        return ["/".join([package, *folders[:2]]), "parts", "both packages"]
    return [f"{package} core", "core", "both packages"]


def sizes() -> dict[str, tuple[int, int]]:
    """Return the lines and the number of files, of which those without code do not count, by these names."""
    counts: defaultdict[str, list[int]] = defaultdict(list)
    for package in ("engine", "server", "tests"):
        for path in ROOT.glob(f"{package}/**/*.py"):
            for name in names(path) if "node_modules" not in path.parts else ():
                counts[name].append(num_code_lines(path))
    return {name: (sum(lines), sum(map(bool, lines))) for name, lines in counts.items()}


def main() -> None:
    """Print a table."""
    for name, (num_lines, num_files) in sorted(sizes().items()):
        sys.stdout.write(f"{name:28}{num_lines:8,} lines{num_files:6} files\n")


if __name__ == "__main__":
    main()
