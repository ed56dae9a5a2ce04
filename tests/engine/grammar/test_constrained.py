"""Answers of the real model to requests with a grammar, against jsonschema and regular expressions."""

import json
import random
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import load_model
from engine.shared.messages import FinishReason, SamplingParams, Submit, TokenEvent
from server.constrained.constraints import ConstraintBuilder
from server.text.tokenizer import Tokenizer
from tests.support.answers import Answer, join
from tests.support.examples import num_examples

SEED = 3
PROMPT = "<|im_start|>user\nDescribe a cat as JSON.<|im_end|>\n<|im_start|>assistant\n"


class Model:
    """The loaded model, and engines for it with its tokenizer."""

    def __init__(self, path: Path) -> None:
        self.config = EngineConfig(model_path=str(path), max_model_len=1024)
        self.loaded = load_model(self.config)
        self.tokenizer = Tokenizer.from_model(path)
        self.vocabulary = self.tokenizer.to_json()

    def engine(self, *, overlaps: bool = False, **options: Any) -> Engine:
        engine = Engine(msgspec.structs.replace(self.config, **options), self.loaded, overlaps=overlaps)
        engine.grammars.set_tokenizer(self.vocabulary)
        return engine

    def submit(self, grammar: str | None, *, n: int = 1, prompt: str = PROMPT, **params: Any) -> Submit:
        fields = {"max_tokens": 150, "temperature": 1.5, "seed": SEED} | params
        return Submit(
            request_id=f"r{random.randrange(2**63)}",
            prompt_token_ids=self.tokenizer.encode(prompt),
            params=SamplingParams(grammar=grammar, **fields),
            arrival=0.0,
            n=n,
        )

    def run(self, submits: Sequence[Submit], engine: Engine | None = None) -> list[list[Answer]]:
        """Return the choices of each request, computed in one batch."""
        engine = engine or self.engine()
        for submit in submits:
            engine.add(submit)
        answers = self.finish(engine, *submits)
        engine.scheduler.check()
        return answers

    def finish(self, engine: Engine, *submits: Submit) -> list[list[Answer]]:
        """Run steps until all choices of the requests have ended."""
        ids, events = {submit.request_id for submit in submits}, list[TokenEvent]()
        while sum(event.finish_reason is not None for event in events) < sum(submit.n for submit in submits):
            events += [event for event in engine.step()[1] if event.request_id in ids]
        answers = join(events)
        return [[answers[submit.request_id, index] for index in range(submit.n)] for submit in submits]

    def text(self, answer: Answer) -> str:
        return self.tokenizer.decode(answer.token_ids)

    def answer(self, grammar: str | None, engine: Engine | None = None, **fields: Any) -> Answer:
        return self.run([self.submit(grammar, **fields)], engine)[0][0]


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Model:
    return Model(smollm2_path)


def of_schema(schema: Mapping[str, Any]) -> str:
    return ConstraintBuilder({}).json_schema(schema, "schema").grammar


def of_regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def objects(properties: dict[str, Any], num_required: int) -> dict[str, Any]:
    required = list(properties)[:num_required]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def arrays(items: dict[str, Any], low: int, span: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": low + span}


# Schemas whose answers are short, so that most of them end.
TEXT = {"type": "string", "minLength": 2, "maxLength": 5}
SCHEMAS: tuple[dict[str, Any], ...] = (
    objects({"a": TEXT, "é _": {"type": "integer", "minimum": -99, "maximum": 1234}}, 1),
    objects({"a": {"type": "string", "format": "date"}, "b": {"type": ["null", "boolean"]}}, 2),
    arrays({"type": "number", "exclusiveMinimum": 0, "maximum": 7}, 1, 2),
    {"enum": ["a", None, 2**63 - 1, -(10**18)]},
    {"const": [True, "x"]},
    {"anyOf": [{"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"}, objects({"a": {"type": "null"}}, 1)]},
    arrays({"$ref": "#/$defs/item"}, 2, 1) | {"$defs": {"item": TEXT}},
    objects({"a": arrays(objects({"b": {"$ref": "#/$defs/item"}}, 0), 0, 2)}, 1) | {"$defs": {"item": TEXT}},
)


@pytest.mark.drawn
def test_whatever_the_schema_the_answer_is_valid(model: Model) -> None:
    seeds = range(num_examples(1, 10))
    submits = [model.submit(of_schema(schema), seed=seed) for schema in SCHEMAS for seed in seeds]
    answers = [choices[0] for choices in model.run(submits)]
    assert {answer.error for answer in answers} == {None}
    schemas = [schema for schema in SCHEMAS for _ in seeds]
    ended = [pair for pair in zip(schemas, answers, strict=True) if pair[1].reason == FinishReason.STOP]
    assert len(ended) > len(schemas) / 2
    for schema, answer in ended:
        validator = Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
        validator.validate(json.loads(model.text(answer)))
        assert not re.search(r"\s", re.sub(r'"(?:[^"\\]|\\.)*"', "", model.text(answer))), "space outside of strings"
    for answer in answers:
        assert answer.reason == FinishReason.STOP or len(answer.token_ids) == 150


SCHEMA = objects(
    {
        "name": {"type": "string", "maxLength": 12},
        "customer_identifier": {"type": "integer", "minimum": 0, "maximum": 9999},
        "is_active_member": {"type": "boolean"},
        "favourite_colours": arrays({"enum": ["red", "green", "blue"]}, 1, 2),
    },
    4,
)


def mixed_submits(model: Model) -> list[Submit]:
    grammars = [of_schema(SCHEMA), of_regex("([a-z]{1,9} ){4}end"), None, of_schema({"type": "object"})]
    more: dict[str, Any] = {"max_tokens": 30, "logprobs": 2}
    return [
        model.submit(grammars[0], seed=0, temperature=0.0, **more),
        model.submit(grammars[1], n=2, seed=1, repetition_penalty=1.3, logit_bias={105: 3.0}, **more),
        model.submit(grammars[2], seed=2, **more),
        model.submit(grammars[3], n=2, seed=3, temperature=0.0, **more),
        model.submit(grammars[0], seed=4, **more),
    ]


def test_the_same_bits_however_they_are_computed(model: Model) -> None:
    """Answers are equal alone and in a batch, with and without drafts or overlap, and after preemption."""
    submits = mixed_submits(model)
    alone = [model.run([submit])[0] for submit in submits]
    assert len({tuple(answer.token_ids) for choices in alone for answer in choices}) > 4
    for mode in ("off", "auto"):
        assert model.run(submits, model.engine(speculative=mode)) == alone
    assert model.run(submits, model.engine(speculative="off", overlaps=True)) == alone
    small = model.engine()
    small.scheduler.pool.allocate(small.scheduler.pool.num_free - 6)
    small.scheduler.check = lambda: None  # type: ignore[method-assign]  # the blocks above are nobody's
    for submit in submits:
        small.add(submit)
    small.grammars._thread.submit(int).result()  # all grammars are compiled, so the requests start together
    assert model.finish(small, *submits) == alone
    assert small.scheduler.current_stats().preemptions_total > 0


@pytest.mark.parametrize("mode", ["off", "auto"])
def test_what_is_forced_takes_one_step(model: Model, mode: str) -> None:
    text = '{"kind":"a sentence that nobody would have guessed","of":["seventeen","tokens","or","more"]}'
    engine = model.engine(speculative=mode)
    answer = model.answer(of_schema({"const": json.loads(text)}), engine)
    assert model.text(answer) == text
    assert len(answer.token_ids) > 25
    assert engine.scheduler.current_stats().steps_total <= 4


def test_forced_tokens_are_drafted_within_bounds(model: Model) -> None:
    """The number of forced tokens per draft doubles after each fully accepted draft."""
    text = " ".join(f"word{number}" for number in range(60))
    engine = model.engine(speculative="off")
    engine.add(model.submit(of_regex(text), max_tokens=400))
    limit, drafts = 16, []
    while engine.has_work:
        step, (event,) = engine.step()
        assert step is not None
        (item,) = step.scheduled
        drafts.append(len(item.draft_token_ids))
        assert drafts[-1] <= limit
        if drafts[-1]:
            num_accepted = len(event.token_ids) - 1
            limit = 2 * limit if num_accepted == drafts[-1] else max(4, 2 * num_accepted)
    assert max(drafts) >= 16


def test_log_probabilities_are_the_models_own(model: Model) -> None:
    free = model.answer(None, temperature=0.0, max_tokens=1, logprobs=5).logprobs[0]
    bound = model.answer(of_schema(SCHEMA), temperature=0.0, logprobs=5).logprobs[0]
    assert (bound.top_token_ids, bound.top_logprobs) == (free.top_token_ids, free.top_logprobs)
    assert bound.logprob < free.logprob


def test_the_end_of_the_grammar_overrules(model: Model) -> None:
    for params in ({"ignore_eos": True, "min_tokens": 20}, {"logit_bias": {0: -100.0, 2: -100.0}}):
        answer = model.answer(of_regex("[0-9]{3}"), **params)
        assert answer.reason == FinishReason.STOP
        assert re.fullmatch("[0-9]{3}", model.text(answer))
    answer = model.answer(of_regex("[0-9]{3,}"), ignore_eos=True, max_tokens=12)
    assert (answer.reason, len(answer.token_ids)) == (FinishReason.LENGTH, 12)
    answer = model.answer(of_regex("[0-9]*"), min_tokens=9, max_tokens=40)
    assert len(answer.token_ids) >= 9


@pytest.mark.checklist("C14")
def test_where_a_grammar_cannot_be_followed_the_request_fails(model: Model) -> None:
    """The server refuses such a grammar; if one arrives anyway, other requests are not affected."""
    never, good = model.submit("start: a\na: a", n=2), model.submit(of_regex("[0-9]{3}"))
    failed, (answer,) = model.run([never, good])
    assert [(choice.reason, choice.token_ids) for choice in failed] == [(FinishReason.ERROR, [])] * 2
    problem = "the grammar cannot be followed: it cannot be compiled: no text matches it"
    assert {choice.error for choice in failed} == {problem}
    assert answer.reason == FinishReason.STOP


def test_who_waits_for_a_grammar_holds_up_nobody(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, gate = model.engine(), threading.Event()
    engine.grammars.prepare()
    compiler: Any = engine.grammars._compiler
    compile_soon = compiler.compile
    monkeypatch.setattr(compiler, "compile", lambda grammar: compile_soon(grammar) if gate.wait(30) else None)
    waiting = model.submit(of_schema(SCHEMA), n=2)
    engine.add(waiting)
    for _ in range(3):
        assert engine.step() == (None, [])
    assert model.answer(None, engine, max_tokens=5).reason == FinishReason.LENGTH
    assert engine.scheduler.current_stats().num_waiting == 2
    gate.set()
    ((first, second),) = model.finish(engine, waiting)
    assert first.reason == second.reason == FinishReason.STOP


def test_who_leaves_while_the_grammar_is_compiled(model: Model) -> None:
    engine = model.engine()
    submit = model.submit(of_schema(SCHEMA), n=2)
    engine.add(submit)
    engine.abort(submit.request_id)
    assert not engine.has_work
    assert model.answer(of_regex("[0-9]{3}"), engine).reason == FinishReason.STOP
