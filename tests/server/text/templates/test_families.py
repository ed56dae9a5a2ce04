"""Names of formats of tool calls."""

import re

from server.text.parsers.harmony import HARMONY
from server.text.parsers.tool_formats import GENERIC
from server.text.templates.chat_template import UNRECOGNIZED
from server.text.templates.families import ANNOUNCED, FAMILIES, GENERAL_NAMES, announced_format
from tests.support.paths import ROOT


def test_the_documentation_names_all_formats() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    table = text.partition("| `tool_format` |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    names = {name for families in FAMILIES.values() for _, name, _ in families}
    names |= {*GENERAL_NAMES.values(), *(format.name for _, format in ANNOUNCED)}
    names |= {GENERIC.name, HARMONY.name, UNRECOGNIZED}
    assert documented == names


def test_prompts_announce_formats() -> None:
    announced = announced_format("Respond with <|tool_call|> followed by a JSON list of tools used.")
    assert announced is not None
    assert (announced.name, announced.start) == ("granite", "<|tool_call|>[")
    assert announced_format("List of tools: []") is None
