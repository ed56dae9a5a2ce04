"""Schemas and grammars for tests of constrained answers."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from engine.grammar.compiler import GrammarCompiler
from engine.shared.messages import Submit
from server.text.tokenizer import Tokenizer
from tests.support.clients import ask
from tests.support.serving import RunningServer
from tests.support.tiny_tokenizer_model import END_OF_TEXT_ID

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
COMPACT, SPACED = '{"name":"Jo","age":3}', '{"name": "Jo", "age": 3}'  # objects of this schema


def nested(depth: int) -> dict[str, Any]:
    """Return a schema of arrays nested `depth` deep."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def json_schema(schema: object, **fields: object) -> dict[str, Any]:
    """Return a `response_format` with the schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True} | fields}


def grammar_of(server: RunningServer, path: str, **fields: Any) -> str | None:
    """Send a request and return the grammar that the engine receives."""
    assert ask(server.url, path, max_tokens=3, **fields).status_code == 200
    submit = [message for message in server.engine.received if isinstance(message, Submit)][-1]
    return submit.params.grammar


def matches(server: RunningServer, grammar: str | None, text: str) -> bool:
    """Return whether the grammar allows the text, which may contain special tokens, as a whole answer."""
    assert grammar is not None
    return allows(server.model.tokenizer, grammar, text)


def check_matches(server: RunningServer, grammar: str | None, good: Iterable[str], bad: Iterable[str]) -> None:
    """Assert that the grammar allows the good texts and none of the bad ones."""
    assert [text for text in good if not matches(server, grammar, text)] == []
    assert [text for text in bad if matches(server, grammar, text)] == []


def allows(tokenizer: Tokenizer, grammar: str, text: str) -> bool:
    matcher, token_ids = compiler_of(tokenizer).compile(grammar), tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()


@cache
def compiler_of(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.to_json(), [END_OF_TEXT_ID])
