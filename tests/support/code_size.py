"""Lines of code: those that have more than blanks, comments and docstrings."""

import ast
import io
import tokenize
from pathlib import Path

SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def num_code_lines(path: Path) -> int:
    """Return the number of lines of code in a Python file."""
    text = path.read_text(encoding="utf-8")
    tokens = [each for each in tokenize.generate_tokens(io.StringIO(text).readline) if each.type not in SILENT]
    lines = {line for each in tokens for line in range(each.start[0], each.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(ast.Constant(str())) as docstring, *_]:
                    lines.difference_update(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(lines)
