"""Keep the code readable: short files and functions, docstrings that say what a function does, one word a thing."""

import ast
import re

from tests.size import num_code_lines, sizes
from tests.support.paths import ROOT

SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for room in ("engine", "server") for path in ROOT.glob(f"{room}/**/*.py")
)

MAX_FILE_LINES = 500
MAX_CLASS_LINES = 330
MAX_FUNCTION_LINES = 60
MAX_TEST_LINES = 50_000
MAX_LINES = {"engine core": 9_775, "server core": 11_970, "core": 21_745, "both packages": 40_860}  # may only fall
MAX_FILES = 300

# A docstring that begins like this names a thing; it should say what the function does.
NAMES_A_THING = re.compile(r"(What|Whether|Of|As|Those|That|How|Where|By|Who|From|To be)\b")

PRIVATE_WORDS = re.compile(
    r"judge[_ds]|_judge|verdict|lifeline|(?<!\x22)sibling|\bheir\b|leader_of|_mourn|thoughts|NO_PLACE|lora_place|\bthereof\b",
    re.IGNORECASE,
)


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def test_files_classes_and_functions_are_short() -> None:
    too_long: list[str] = []
    for path in SOURCES:
        module = tree(path)
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                limit = MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES
                if (node.end_lineno or 0) - node.lineno >= limit:
                    too_long.append(f"{path}: {node.name}")
        if len((ROOT / path).read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES:
            too_long.append(path)
    assert too_long == []


def test_docstrings_say_what_a_function_does() -> None:
    nodes = [(path, node) for path in SOURCES for node in ast.walk(tree(path))]
    functions = [(path, node) for path, node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [(path, f.name) for path, f in functions if NAMES_A_THING.match(ast.get_docstring(f) or "")] == []


def test_words_are_the_fields() -> None:
    assert [path for path in SOURCES if PRIVATE_WORDS.search((ROOT / path).read_text(encoding="utf-8"))] == []


def test_the_tests_are_no_longer_than_their_budget() -> None:
    """Without what npm has installed there."""
    paths = [path for path in ROOT.glob("tests/**/*.py") if "node_modules" not in path.parts]
    assert sum(map(num_code_lines, paths)) <= MAX_TEST_LINES


def test_core_and_parts_are_no_longer_than_their_budgets() -> None:
    found = sizes()
    assert {name: lines for name, (lines, _) in found.items() if lines > MAX_LINES.get(name, lines)} == {}
    assert found["both packages"][1] <= MAX_FILES
