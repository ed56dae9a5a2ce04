"""Generated tables are current, and the tables of errors and endpoints are complete."""

import re
from pathlib import Path

from server.parts.messages.writer import TYPES
from server.settings.load import load_settings
from tests.docs.generate import TABLES, with_tables
from tests.support.documents import blocks, spans, text_of
from tests.support.paths import ROOT


def test_tables_are_current() -> None:
    old = [document for document in TABLES if with_tables(document) != text_of(document)]
    assert old == [], "run `python -m tests.docs.generate`"


def test_every_error_is_listed() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "server/http").glob("*.py")]
    codes = {code for source in sources for code in re.findall(r'\bcode(?:: str)?(?: \| None)? ?= ?"(\w+)"', source)}
    assert len(codes) > 10
    assert codes - set(spans("docs/api.md")) == set()
    table = text_of("docs/api.md").partition("\n## Errors\n")[2]
    statuses = {int(status) for status in re.findall(r"^\| (\d{3}) \|", table, re.MULTILINE)}
    assert statuses >= set(TYPES)


def test_files_of_settings_are_valid(tmp_path: Path) -> None:
    examples = [block.text for block in blocks("docs/settings.md") if block.language == "yaml"]
    assert examples
    for text in examples:
        (tmp_path / "config.yaml").write_text(text)
        load_settings(config=str(tmp_path / "config.yaml"))


def test_every_route_is_listed() -> None:
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("server/*/**/*.py")]
    routes = {
        (method.upper(), re.sub(r"\{\w+(:\w+)?\}", "{id}", path))
        for source in sources
        for method, path in re.findall(r'^@\w+\.(get|post|delete)\("([^"]+)"', source, re.MULTILINE)
    }
    assert len(routes) > 20
    listed = {tuple(span.split(" ", 1)) for span in spans("docs/api.md") if re.match("(GET|POST|DELETE) /", span)}
    assert routes - listed == set()
