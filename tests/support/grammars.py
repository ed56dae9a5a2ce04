"""Schemas and grammars for tests of constrained answers."""

from typing import Any

from engine.grammar.compiler import GrammarCompiler
from engine.shared.messages import Submit, Vocabulary
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
    """Return whether the grammar allows the text, one token per byte, as a whole answer."""
    (vocabulary,) = [message for message in server.engine.received if isinstance(message, Vocabulary)]
    assert grammar is not None
    matcher = GrammarCompiler(vocabulary.tokenizer, [END_OF_TEXT_ID]).compile(grammar)
    return matcher.try_consume_tokens([*text.encode()]) == len(text.encode()) and matcher.is_accepting()
