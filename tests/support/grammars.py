"""Schemas and grammars for tests of constrained answers."""

import json
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from engine.grammar.compiler import GrammarCompiler
from engine.shared.messages import Submit
from server.text.parsers.answer_parts import AnswerPart, PartKind
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


class GrammarModel:
    """The tokenizer of a model folder, and what a grammar allows with it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_model(folder)
        self.guide = LLTokenizer((folder / "tokenizer.json").read_text(), eos_token=[END_OF_TEXT_ID])

    def matcher(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.guide, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher

    def accepts(self, grammar: str, text: str) -> bool:
        """Return whether the text is a whole output under the grammar."""
        matcher, token_ids = self.matcher(grammar), self.tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()

    def sample(self, matcher: LLMatcher, rng: random.Random, ends: Sequence[str] = ('"',)) -> str:
        """Return a random output. Texts that end values, `ends`, are tried often, so that strings end."""
        tried = [self.tokenizer.encode(text, add_special_tokens=False) for text in ends]
        token_ids: list[int] = []
        while not matcher.is_stopped():
            assert len(token_ids) < 5000
            end = rng.choice(tried)
            if rng.random() < 0.3 and len(end) == matcher.validate_tokens(end):
                assert matcher.consume_tokens(end)
                token_ids += end
                continue
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            allowed = [token_id for token_id in range(self.tokenizer.vocab_size) if mask >> token_id & 1]
            closing = [each for each in allowed if each > END_OF_TEXT_ID or each in (*b'"<\n',)]
            token_id = rng.choice(closing if closing and rng.random() < len(token_ids) / 200 else allowed)
            token_id = END_OF_TEXT_ID if END_OF_TEXT_ID in allowed and rng.random() < 0.5 else token_id
            assert matcher.consume_token(token_id)
            token_ids.append(token_id)
        assert not matcher.is_error(), matcher.get_error()
        return self.tokenizer.decode([each for each in token_ids if each != END_OF_TEXT_ID], skip_special_tokens=False)


def calls_of(parts: Iterable[AnswerPart]) -> list[tuple[str, Any]]:
    """Return the names and the arguments of the calls among the parts of an answer."""
    calls: list[tuple[str, str]] = []
    for kind, text in parts:
        if kind is PartKind.CALL:
            calls.append((text, ""))
        elif kind is PartKind.ARGUMENTS:
            calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return [(name, json.loads(arguments)) for name, arguments in calls]
