"""The checklist of SECURITY.md, and which tests check its entries: those marked `@pytest.mark.checklist("A01")`."""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from tests.support.paths import ROOT

MARKER = "checklist"

# Section -> id -> (what happens, what the server does).
Checklist = Mapping[str, Mapping[str, tuple[str, str]]]


def read_checklist() -> Checklist:
    sections = yaml.safe_load((ROOT / "tests/docs/checklist.yaml").read_text(encoding="utf-8"))
    return {title: {id: (str(case), str(answer)) for id, (case, answer) in s.items()} for title, s in sections.items()}


def find_marks(source: str) -> Iterator[str]:
    """Yield the ids with which the functions of a module are marked."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for decorator in node.decorator_list:
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{MARKER}":
                    yield from (str(ast.literal_eval(argument)) for argument in decorator.args)


def files_by_id() -> Mapping[str, list[Path]]:
    """Return the test files in which each id is checked, relative to the repository."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        for id in sorted(set(find_marks(path.read_text(encoding="utf-8")))):
            files[id].append(path.relative_to(ROOT))
    return files


def markdown_table() -> str:
    """Return a table for each section; a test is a link to its file."""
    files = files_by_id()
    lines: list[str] = []
    for title, entries in read_checklist().items():
        lines += [f"### {title}", "", "| | What happens | What the server does | Tests |", "|-|-|-|-|"]
        for id, (case, answer) in entries.items():
            tests = ", ".join(f"[{path.stem.removeprefix('test_')}]({path.as_posix()})" for path in files[id])
            lines.append(f"| {id} | {case} | {answer} | {tests} |")
        lines.append("")
    return "\n".join(lines)
