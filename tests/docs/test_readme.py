"""The README is short, in its order, and links to every document."""

import re

from tests.support.documents import links, text_of
from tests.support.paths import ROOT

MAX_WORDS = 900
SECTIONS = ["How fast it is", "Start", "Use", "Docker", "What makes it different", "Models", "Where to read on"]


def test_readme_is_short() -> None:
    assert len(text_of("README.md").split()) <= MAX_WORDS


def test_readme_is_in_order() -> None:
    assert re.findall(r"^## (.+)$", text_of("README.md"), re.MULTILINE) == SECTIONS


def test_readme_leads_to_every_document() -> None:
    documents = {path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"))}
    assert documents - {"README.md"} <= set(links("README.md"))


def test_the_decoder_is_as_short_as_the_readme_says() -> None:
    assert "in about 250 lines" in text_of("README.md")
    assert len((ROOT / "engine/model/decoder.py").read_text(encoding="utf-8").splitlines()) <= 270
