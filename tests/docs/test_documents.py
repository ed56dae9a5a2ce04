"""What documents and project files mention exists: links, paths, names, flags, metrics, commands and checklist."""

import importlib.util
import re
import shlex
from typing import Any

import yaml

from server.cli.main import make_parser
from tests.docs.checklist import files_by_id, markdown_table, read_checklist
from tests.docs.commands import EXCEPTIONS, is_exception, shown_commands
from tests.docs.metrics import exposed_families
from tests.support.documents import DOCUMENTS, anchors, links, spans, text_of
from tests.support.paths import ROOT

FOLDERS = r"(?:engine|server|tests|deploy|docs|examples)/[\w./-]*"
PATH = re.compile(rf"{FOLDERS}|\.ci/run")
NAME_IN_FILE = re.compile(rf"({FOLDERS}\.py):([\w.]+)")
FLAG = re.compile(r"--[a-z][a-z-]+")
METRIC = re.compile(r"lightwell_[a-z_]+")
SPANS = [(document, span) for document in DOCUMENTS for span in spans(document)]

# Flags of other programs, and of the project's own scripts.
OTHER_FLAGS = {
    "--max-cpu-loras",  # vLLM
    "--model",  # lm-eval
    "--slice",  # tests/conftest.py
    "--report",
    "--budget",
    "--vllm",  # tests/bench/gpu.py
    "--ranks",  # tests/bench/profile_step.py
    "--build-arg",
    "--secret",
    "--index-url",
    "--json",
    "--help",
}


def command_line() -> dict[str, set[str]]:
    """Return the flags of each command of `lightwell`."""
    (commands,) = (action.choices for action in make_parser()._actions if isinstance(action.choices, dict))
    return {
        name: {option for action in command._actions for option in action.option_strings}
        for name, command in commands.items()
    }


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for link in links(document):
            if re.match("[a-z]+:", link):
                assert link.startswith(("https://", "http://")), (document, link)
                continue
            path, _, anchor = link.partition("#")
            target = (ROOT / document).parent / path if path else ROOT / document
            assert target.exists(), (document, link)
            assert not anchor or anchor in anchors(target), (document, link)


def test_paths_exist() -> None:
    for document, span in SPANS:
        if match := NAME_IN_FILE.fullmatch(span):
            assert defines(match[1], match[2]), (document, span)
        elif PATH.fullmatch(span):
            assert (ROOT / span).exists(), (document, span)


def defines(path: str, name: str) -> bool:
    """Return whether a file has a definition of each part of `name` or `Class.name`."""
    text = (ROOT / path).read_text(encoding="utf-8")
    parts = name.split(".")
    return all(re.search(rf"^ *(?:(?:async )?def |class )?{part}\b *[(:=\[]", text, re.MULTILINE) for part in parts)


def test_flags_metrics_and_commands_exist() -> None:
    commands = command_line()
    flags = OTHER_FLAGS.union(*commands.values())
    metrics = {family.name for family in exposed_families()}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document, span in SPANS:
        if span.startswith(("--", "lightwell ")):
            assert set(FLAG.findall(span)) <= flags, (document, span)
        if METRIC.fullmatch(span):
            assert {span, span.removesuffix("_total")} & metrics, (document, span)
        match span.split():
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), (document, span)
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module) is not None, (document, span)
            case ["lightwell", command, *_]:
                assert command in commands, (document, span)


def test_shown_commands_are_run_or_exceptions() -> None:
    """By tests/e2e/test_documentation.py. Their flags are known."""
    shown = shown_commands()
    assert [beginning for beginning in EXCEPTIONS if not any(command.startswith(beginning) for command in shown)] == []
    assert len([command for command in shown if not is_exception(command)]) > 10
    found = [re.search(r"(?:^|&& |^\S+=\S+ )(?:\.venv/bin/)?lightwell (.+)", command) for command in shown]
    arguments = [match[1] for match in found if match]
    assert len(arguments) > 5
    for text in arguments:
        make_parser().parse_args(shlex.split(text))


def test_every_entry_of_the_checklist_has_a_test_and_every_mark_an_entry() -> None:
    ids = [id for entries in read_checklist().values() for id in entries]
    assert ids == sorted(set(ids))
    files = files_by_id()
    assert sorted(set(ids) - files.keys()) == [], "no test is marked with these ids"
    assert sorted(files.keys() - set(ids)) == [], "marks that tests/docs/checklist.yaml does not have"
    rows = [line for line in markdown_table().splitlines() if re.match(r"\| [A-Z]\d\d ", line)]
    assert [row.count("](tests/") for row in rows] == [len(files[id]) for id in ids]


def test_the_architecture_names_every_folder_and_leads_through_the_code() -> None:
    folders = {
        f"{path.parent.relative_to(ROOT)}/" for room in ("engine", "server") for path in ROOT.glob(f"{room}/*/**/*.py")
    }
    assert folders - set(spans("docs/architecture.md")) == set()
    steps, questions = (
        text_of("docs/architecture.md").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        for title in ("A request in ten steps", "Questions a newcomer asks")
    )
    parts = re.split(r"^\d+\. ", steps, flags=re.MULTILINE)[1:]
    assert len(parts) == 10
    rows = re.findall(r"^\| (.+?\?) \| (.+) \|$", questions, re.MULTILINE)
    assert len(rows) >= 10
    assert [part for part in (*parts, *(answer for _, answer in rows)) if not PATH.search(part)] == []


def test_the_glossary_explains_each_term_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `[^|]+` \| [^|]+ \|$", text_of("docs/glossary.md"), re.MULTILINE)
    assert len(rows) >= 60
    assert len(set(rows)) == len(rows)


def test_the_readme_is_short_in_its_order_and_leads_to_every_document() -> None:
    text = text_of("README.md")
    assert len(text.split()) <= 900
    sections = ["How fast it is", "Start", "Use", "Docker", "What makes it different", "Models", "Where to read on"]
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == sections
    documents = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"))}
    assert documents - {"README.md"} <= set(links("README.md"))
    assert "in about 200 lines" in text
    assert len((ROOT / "engine/model/decoder.py").read_text(encoding="utf-8").splitlines()) <= 215


def test_files_that_other_programs_read() -> None:
    """Workflow, hooks, changelog."""

    def load(path: str) -> Any:
        return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))

    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    tools = {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.partition("\ncheck:")[2].partition("\n\n")[0]
    assert tools == {line.removeprefix("\t$(BIN)/").split()[0] for line in recipe.splitlines()[1:]} == {"ruff", "mypy"}
    headings = [line for line in text_of("CHANGELOG.md").splitlines() if line.startswith("## ")]
    assert headings[0] == "## [Unreleased]"
