"""Reduces recorded requests to what differs between them, without texts, paths and ids of whoever recorded them."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from tests.conformance.programs import Program
from tests.conformance.scripted_server import Exchange
from tests.conformance.table import REPLAYS

MAX_CHARS = 48  # longer texts are replaced
TEXT_KEYS = {"description", "text", "instructions", "content", "output", "title", "markdownDescription"}
KEPT_TEXTS = {"hello", "I will look.\n", "marker-42"}
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# Headers that a server may read. Clients send others about themselves.
HEADERS = ("accept", "anthropic-version", "anthropic-beta", "content-type", "openai-beta", "user-agent")


def write_replay(program: Program, version: str, exchanges: Sequence[Exchange]) -> None:
    """Write the requests of a conversation that are not like an earlier one."""
    requests, seen = [], set[str]()
    for exchange in exchanges:
        if not exchange.path.startswith("/v1/"):
            continue
        request: dict[str, Any] = {"method": exchange.method, "path": exchange.path}
        request |= {"headers": {name: exchange.headers[name] for name in HEADERS if name in exchange.headers}}
        body = reduced(exchange.body)
        new = {f"{exchange.path} {shape}" for shape in shapes(body)}
        if not new <= seen:
            requests.append(request | {"warnings": exchange.warnings, "body": body})
        seen |= new
    replay = {"client": program.package, "version": version, "requests": requests}
    text = json.dumps(replay, indent=1, ensure_ascii=False)
    (REPLAYS / f"{program.slug}.json").write_text(text + "\n", encoding="utf-8")


def reduced(value: Any, key: str = "") -> Any:
    """Return the value with short texts, and with only those tools that are not like an earlier one."""
    if isinstance(value, dict):
        return {name: reduced(item, name) for name, item in value.items()}
    if isinstance(value, list):
        items = [reduced(item, key) for item in value]
        return _distinct(items) if key == "tools" else items
    if isinstance(value, str):
        return _reduced_text(value, key)
    return value


def _reduced_text(text: str, key: str) -> str:
    text = UUID.sub("00000000-0000-4000-8000-000000000000", text)
    if text in KEPT_TEXTS or key == "$schema" or (key not in TEXT_KEYS and len(text) <= MAX_CHARS and "/" not in text):
        return text
    if key == "arguments" or not text:  # JSON
        return text
    return f"A text of {len(text)} characters."


def _distinct(items: list[Any]) -> list[Any]:
    """Return the items whose shape has something that no earlier one has, at most twelve."""
    kept, seen = list[Any](), set[str]()
    for item in items:
        new = set(shapes(item))
        if not new <= seen and len(kept) < 12:
            kept.append(item)
            seen |= new
    return kept


def shapes(value: Any, path: str = "") -> Iterator[str]:
    """Yield the paths in a value, each with the type found there. Names of properties and indices are left out."""
    if isinstance(value, dict):
        is_named = path.endswith(".properties")
        for name, item in value.items():
            yield from shapes(item, path if is_named else f"{path}.{name}")
    elif isinstance(value, list):
        yield f"{path} list"
        for item in value:
            yield from shapes(item, path)
    elif path.endswith((".type", ".role")):
        yield f"{path} {value}"
    else:
        yield f"{path} {type(value).__name__}"
