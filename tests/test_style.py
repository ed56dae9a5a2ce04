"""Keep the code readable: short files and functions, docstrings that say what a function does, one word a thing."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.support.code_size import num_code_lines
from tests.support.paths import ROOT

SOURCES = sorted(
    path.relative_to(ROOT).as_posix() for room in ("engine", "server") for path in ROOT.glob(f"{room}/**/*.py")
)

MAX_FILE_LINES = 500
MAX_CLASS_LINES = 330
MAX_FUNCTION_LINES = 60
MAX_FOLDER_MODULES = 15
MAX_TEST_LINES = 53_500

# A docstring that begins like this names a thing; it should say what the function does.
NAMES_A_THING = re.compile(r"(What|Whether|Of|As|Those|That|How|Where|By|Who|From|To be)\b")

PRIVATE_WORDS = re.compile(
    r"judge[_ds]|_judge|verdict|lifeline|(?<!\x22)sibling|\bheir\b|leader_of|_mourn|thoughts|NO_PLACE|lora_place|\bthereof\b",
    re.IGNORECASE,
)


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def names_a_thing(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return NAMES_A_THING.match(ast.get_docstring(node) or "") is not None


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_files_classes_and_functions_are_short() -> None:
    too_long: list[str] = []
    for path in SOURCES:
        module = tree(path)
        kinds = (((ast.ClassDef,), MAX_CLASS_LINES), ((ast.FunctionDef, ast.AsyncFunctionDef), MAX_FUNCTION_LINES))
        for kind, limit in kinds:
            found = [node for node in ast.walk(module) if isinstance(node, kind)]
            too_long += [f"{path}: {node.name}" for node in found if num_lines(node) > limit]
        if len((ROOT / path).read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES:
            too_long.append(path)
    assert too_long == []


def test_no_folder_is_crowded() -> None:
    num_modules = Counter(str(Path(path).parent) for path in SOURCES if not path.endswith("__init__.py"))
    assert {folder: num for folder, num in num_modules.items() if num > MAX_FOLDER_MODULES} == {}


def test_docstrings_say_what_a_function_does() -> None:
    found = [f"{path}: {node.name}" for path in SOURCES for node in functions(tree(path)) if names_a_thing(node)]
    assert found == []


def test_words_are_the_fields() -> None:
    assert [path for path in SOURCES if PRIVATE_WORDS.search((ROOT / path).read_text(encoding="utf-8"))] == []


def test_the_tests_are_no_longer_than_their_budget() -> None:
    """Without what npm has installed there."""
    paths = [path for path in ROOT.glob("tests/**/*.py") if "node_modules" not in path.parts]
    assert sum(map(num_code_lines, paths)) <= MAX_TEST_LINES
