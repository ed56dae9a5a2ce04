"""The checklist of SECURITY.md, and which tests check its entries: those marked `@pytest.mark.checklist("A01")`."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import yaml

from tests.support.paths import ROOT

# Section -> id -> (what happens, what the server does).
Checklist = Mapping[str, Mapping[str, tuple[str, str]]]


def read_checklist() -> Checklist:
    sections = yaml.safe_load((ROOT / "tests/docs/checklist.yaml").read_text(encoding="utf-8"))
    return {title: {id: (str(case), str(answer)) for id, (case, answer) in s.items()} for title, s in sections.items()}


def files_by_id() -> Mapping[str, list[Path]]:
    """Return the test files in which each id is checked, relative to the repository."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        marks = re.findall(r"^@pytest\.mark\.checklist\((.+)\)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for id in sorted(set(re.findall(r"\w+", " ".join(marks)))):
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
