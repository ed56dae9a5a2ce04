"""The Markdown documents of the repository: their code blocks, commands, links, anchors and code spans."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.paths import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "deploy/**/*.md", "examples/*.md", "tests/bench/*.md")
    for path in ROOT.glob(pattern)
)
SHELL = ("sh", "")  # languages of the blocks that hold commands

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"^(?: {4}.*\n)+", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+(?:\n[^`\n]+)*)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    document: str
    language: str
    text: str


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def prose_of(document: str) -> str:
    """Return the document without its blocks of code."""
    return _INDENTED.sub("\n", _FENCE.sub("", text_of(document)))


def blocks(document: str) -> list[Block]:
    return [Block(document, language, text) for language, text in _FENCE.findall(text_of(document))]


def commands(document: str) -> Iterator[str]:
    """Yield the commands of the shell blocks, with continued lines joined and comments removed."""
    for block in blocks(document):
        if block.language in SHELL:
            for line in block.text.replace("\\\n", " ").splitlines():
                if command := re.sub(r"\s+#.*", "", line).strip():
                    yield re.sub(r"\s+", " ", command)


def links(document: str) -> list[str]:
    return _LINK.findall(prose_of(document))


def spans(document: str) -> list[str]:
    """Return what stands between backticks."""
    return [re.sub(r"\s+", " ", span) for span in _SPAN.findall(prose_of(document))]


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = _HEADING.findall(_FENCE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
