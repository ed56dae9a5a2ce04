"""Counts the lines of code of core, parts and tests: `make size`.

A line counts that has more than blanks, comments and docstrings.
"""

import ast
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
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


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """Yield the Python files of a package, each with what it belongs to: the core, a part, or the tests."""
    for path in sorted((ROOT / package).glob("**/*.py")):
        names = path.relative_to(ROOT).parts
        if "node_modules" in names:
            continue
        is_part = names[1] == "parts" and len(names) > 3
        yield "/".join(names[:3]) if is_part and package != "tests" else f"{package} core", path


def sizes() -> dict[str, tuple[int, int]]:
    """Return the lines and the number of files of each core, each part and the tests."""
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for package in ("engine", "server", "tests"):
        for name, path in sources(package):
            owner = "tests" if package == "tests" else name
            lines[owner] += num_code_lines(path)
            files[owner] += bool(num_code_lines(path))
    return {owner: (lines[owner], files[owner]) for owner in lines}


def main() -> None:
    """Print a table."""
    found = sizes()
    product = [owner for owner in found if owner != "tests"]
    found["core"] = tuple(map(sum, zip(*(found[owner] for owner in product if owner.endswith("core")), strict=True)))  # type: ignore[assignment]
    found["parts"] = tuple(map(sum, zip(*(found[owner] for owner in product if "/" in owner), strict=True)))  # type: ignore[assignment]
    found["both packages"] = (found["core"][0] + found["parts"][0], found["core"][1] + found["parts"][1])
    for owner, (num_lines, num_files) in found.items():
        sys.stdout.write(f"{owner:28}{num_lines:8,} lines{num_files:6} files\n")


if __name__ == "__main__":
    main()
