"""Flags of other servers: the table is right about our flags, and each of its rows is what a user gets."""

import re

import pytest

from server.cli.foreign_flags import FOREIGN_FLAGS, MODEL_SYNONYMS
from server.cli.main import main, make_parser
from server.settings.load import load_settings


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Return the flags in the help of a command."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))


@pytest.mark.parametrize("command", FOREIGN_FLAGS)
def test_what_to_use_instead_exists_and_what_not_to_use_does_not(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = flags_of(command, capsys)
    for flag, text in FOREIGN_FLAGS[command].items():
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
        assert named <= own, (flag, named - own)
    if command != "run":  # which has the flags of a chat too
        assert own & FOREIGN_FLAGS[command].keys() == set()


@pytest.mark.parametrize("command", FOREIGN_FLAGS)
def test_each_is_explained(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (flag, text) in enumerate(FOREIGN_FLAGS[command].items()):
        if command == "run" and flag in ("--temperature", "--top-p"):
            continue
        ways = [flag, "secret"], [f"{flag}=secret"], ["--seed", "1", flag]
        with pytest.raises(SystemExit) as ended:
            main([command, *ways[number % 3]])
        assert ended.value.code == 2
        error = f"lightwell: error: unknown flag {flag}: {text} (see lightwell {command} --help)\n"
        assert capsys.readouterr().err == error


@pytest.mark.parametrize("flag", MODEL_SYNONYMS)
@pytest.mark.parametrize("command", ["serve", "run"])
def test_the_model_can_be_given_as_elsewhere(command: str, flag: str) -> None:
    parse = make_parser().parse_args
    for arguments in ([flag, "m.gguf", "--port", "1"], ["m.gguf"]):
        assert load_settings(vars(parse([command, *arguments]))).model == "m.gguf"
    for arguments in (["a", flag, "b"], [flag, "b", "a"], [flag, "a", flag, "b"]):
        models = load_settings(vars(parse([command, *arguments]))).models
        assert models == ({"model": "a"}, {"model": "b"})
