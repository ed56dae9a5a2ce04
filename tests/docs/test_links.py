"""Links resolve, and the paths, names, flags and metrics that the documents mention exist."""

import ast
import re

import pytest

from server.cli.main import make_parser
from tests.docs.metrics import exposed_families
from tests.support.documents import DOCUMENTS, anchors, links, spans, text_of
from tests.support.paths import ROOT

FOLDERS = r"(?:engine|server|tests|deploy|docs|examples)/[\w./-]*"
PATH = re.compile(rf"{FOLDERS}|\.ci/run")
NAME_IN_FILE = re.compile(rf"({FOLDERS}\.py):([\w.]+)")
FLAG = re.compile(r"--[a-z][a-z-]+")
METRIC = re.compile(r"lightwell_[a-z_]+")

# Flags of other programs, and of the project's own scripts.
OTHER_FLAGS = {
    "--max-cpu-loras",  # vLLM
    "--model",  # lm-eval
    "--slice",  # tests/conftest.py
    "--report",
    "--budget",
    "--vllm",  # tests/bench/gpu.py
    "--build-arg",
    "--secret",
    "--index-url",
    "--json",
    "--help",
}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for link in links(document):
        if re.match("[a-z]+:", link):
            assert link.startswith(("https://", "http://")), link
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    for span in spans(document):
        if match := NAME_IN_FILE.fullmatch(span):
            assert match[2] in names_in(match[1]), span
        elif PATH.fullmatch(span):
            assert (ROOT / span).exists(), span


def names_in(path: str) -> set[str]:
    """Return the names that a file defines at its top, and `Class.name` for what its classes define."""
    module = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    names = set(defined_in(module.body))
    for node in module.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for name in defined_in(node.body)}
    return names


def defined_in(body: list[ast.stmt]) -> list[str]:
    names = []
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.append(name)
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.append(name)
            case ast.Assign(targets=targets):
                names += [target.id for target in targets if isinstance(target, ast.Name)]
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document: str) -> None:
    known = flags_of_the_command_line() | OTHER_FLAGS
    for span in spans(document):
        if span.startswith(("--", "lightwell ")):
            assert set(FLAG.findall(span)) <= known, span


def flags_of_the_command_line() -> set[str]:
    parser = make_parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return {option for command in commands.values() for action in command._actions for option in action.option_strings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_metrics_exist(document: str) -> None:
    names = {family.name for family in exposed_families()}
    for span in spans(document):
        if METRIC.fullmatch(span):
            assert {span, span.removesuffix("_total")} & names, span


def test_the_architecture_names_every_folder() -> None:
    folders = {
        f"{path.parent.relative_to(ROOT)}/" for room in ("engine", "server") for path in ROOT.glob(f"{room}/*/**/*.py")
    }
    assert folders - set(spans("docs/architecture.md")) == set()


def test_the_architecture_has_ten_steps_and_at_least_ten_questions() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    steps, questions = (
        text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for title in ("A request in ten steps", "Questions a newcomer asks")
    )
    for step in re.split(r"^\d+\. ", steps, flags=re.MULTILINE)[1:]:
        assert PATH.search(step), step
    assert len(re.findall(r"^\d+\. ", steps, re.MULTILINE)) == 10
    rows = re.findall(r"^\| (.+?\?) \| (.+) \|$", questions, re.MULTILINE)
    assert len(rows) >= 10
    for question, answer in rows:
        assert PATH.search(answer), question


def test_the_glossary_explains_each_term_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `[^|]+` \| [^|]+ \|$", text_of("docs/glossary.md"), re.MULTILINE)
    assert len(rows) >= 60
    assert len(set(rows)) == len(rows)
