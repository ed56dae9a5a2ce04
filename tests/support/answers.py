"""Whole answers of an engine, and engines that compute them in different ways."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel
from engine.scheduling.record import RequestRecord
from engine.shared.messages import FinishReason, Submit, TokenEvent, TokenLogprobs
from engine.startup import capture_graphs
from tests.support.outputs import runner_with

Choice: TypeAlias = tuple[str, int]


class Answer(NamedTuple):
    """All events of a choice as one."""

    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str | None = None
    embedding: list[float] | None = None


Answers: TypeAlias = dict[Choice, Answer]


def join(events: Iterable[TokenEvent]) -> Answers:
    answers: Answers = {}
    for event in events:
        before = answers.get((event.request_id, event.index), Answer())
        assert before.reason is None, "there is an event after the last"
        answers[event.request_id, event.index] = Answer(
            before.token_ids + event.token_ids,
            before.logprobs + (event.logprobs or []),
            before.prompt_logprobs + (event.prompt_logprobs or []),
            event.finish_reason,
            event.stop_token_id,
            event.error,
            event.embedding or before.embedding,
        )
    return answers


def run(engine: Engine, submits: Sequence[Submit] = ()) -> Answers:
    """Run requests, and those that the engine has already, to their end. Nothing may be left behind."""
    for submit in submits:
        engine.add(submit)
    answers = join(_events(engine))
    assert all(answer.reason is not None for answer in answers.values())
    assert engine.scheduler.current_stats().num_blocks_used == 0
    return answers


def watch(engine: Engine) -> tuple[list[list[int]], list[RequestRecord]]:
    """Return how many tokens steps compute for their choices from now on, and the records of choices that end."""
    steps, ended = list[list[int]](), list[RequestRecord]()
    engine.on_step.append(lambda step, _: steps.append([item.num_tokens for item in step.scheduled]))
    engine.scheduler.lifecycle.on_end.append(lambda request: ended.append(request.record))
    return steps, ended


def _events(engine: Engine) -> Iterator[TokenEvent]:
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        assert num_steps < 20_000, "it does not end"
        yield from engine.step()[1]
        engine.scheduler.check()


def errors_of(answers: Answers) -> dict[Choice, str]:
    return {choice: answer.error for choice, answer in answers.items() if answer.error is not None}


def assert_same(actual: Answers, expected: Answers) -> None:
    assert not errors_of(expected)
    assert actual.keys() == expected.keys()
    different = [choice for choice in expected if actual[choice] != expected[choice]]
    assert not different


def run_alone(loaded: LoadedModel, submits: Sequence[Submit]) -> Answers:
    """Return the answers to each request alone, its prompt in one chunk, with an empty cache and without drafts."""
    answers: Answers = {}
    for submit in submits:
        answers |= run(make_engine(loaded), [submit])
    return answers


def make_engine(
    loaded: LoadedModel,
    *,
    chunk: int = 0,
    num_blocks: int | None = None,
    seqs: int | None = None,
    speculative: str = "off",
) -> Engine:
    """Return an engine with an empty prefix cache over the same weights and KV memory."""
    config = EngineConfig(model_path="", long_prefill_token_threshold=chunk, speculative=speculative)
    memory = dataclasses.replace(loaded.memory, num_blocks=num_blocks or loaded.memory.num_blocks)
    max_model_len = loaded.limits.max_model_len
    step_tokens = max_model_len // 2 if chunk else max_model_len
    limits = dataclasses.replace(
        loaded.limits, max_num_batched_tokens=step_tokens, max_num_seqs=seqs or loaded.limits.max_num_seqs
    )
    runner = runner_with(loaded, step_tokens, limits.max_num_seqs)
    capture_graphs(runner)  # on a GPU
    engine = Engine(config, dataclasses.replace(loaded, limits=limits, runner=runner, memory=memory))
    if num_blocks is not None:
        engine.scheduler.kv.watermark = 0
    return engine
