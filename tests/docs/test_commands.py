"""Commands that the documentation mentions exist, and the flags of those it shows are valid."""

import importlib.util
import re
import shlex

import pytest

from server.cli.main import make_parser
from tests.docs.commands import EXCEPTIONS, is_exception, shown_commands
from tests.support.documents import DOCUMENTS, spans
from tests.support.paths import ROOT


@pytest.mark.parametrize("beginning", EXCEPTIONS)
def test_exceptions_are_shown(beginning: str) -> None:
    assert any(command.startswith(beginning) for command in shown_commands())


def test_most_commands_are_run() -> None:
    assert len([command for command in shown_commands() if not is_exception(command)]) > 10


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_text_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for span in spans(document):
        match span.split():
            case ["make", target, *_]:
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), span
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module) is not None, span
            case ["lightwell", command, *_]:
                assert command in lightwell_commands(), span


def lightwell_commands() -> set[str]:
    parser = make_parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return set(commands)


def test_flags_of_shown_commands_are_known() -> None:
    found = [re.search(r"(?:^|&& |^\S+=\S+ )(?:\.venv/bin/)?lightwell (.+)", command) for command in shown_commands()]
    arguments = [match[1] for match in found if match]
    assert len(arguments) > 5
    for text in arguments:
        make_parser().parse_args(shlex.split(text))
