"""The reasoning limit on the real model. Any tokens can serve as the tags of the reasoning."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.sampling.sampler import step_masks
from engine.scheduling.request import Scheduled, Status, Step
from engine.shared.messages import ReasoningLimit
from tests.engine.grammar.test_constrained import Model
from tests.support.submits import request_for

END = 17  # a control token that the model does not sample by itself
GRAMMAR = "start: TEXT <[17]> /[0-9]{3}/\nTEXT: /(.|\\n)*/"


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> Model:
    return Model(smollm2_path)


def limit(max_tokens: int, *, start_id: int | None = None, end_id: int = END) -> ReasoningLimit:
    """Return a limit. Without a `start_id`, the prompt has begun the reasoning."""
    return ReasoningLimit(max_tokens=max_tokens, start_id=start_id or 0, end_id=end_id, is_open=start_id is None)


def test_reasoning_ends_where_it_must(model: Model) -> None:
    fields: dict[str, Any] = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}
    free = model.answer(None, **fields).token_ids
    assert len(free) == 24
    assert END not in free
    for reasoning_limit, num_before in (
        (limit(0), 0),
        (limit(10), 10),
        (limit(23), 23),
        (limit(24), None),
        (limit(5, start_id=free[0]), 6),
        (limit(0, start_id=free[3]), free.index(free[3]) + 1),
        (limit(5, start_id=END), None),  # the reasoning never begins
        (limit(10, end_id=free[9]), None),  # the reasoning ends by itself
    ):
        got = model.answer(None, **fields, reasoning_limit=reasoning_limit).token_ids
        if num_before is None:
            assert got == free
        else:
            assert got[: num_before + 1] == [*free[:num_before], END]
            assert got.count(END) == 1


def test_grammars_go_on_behind_the_end(model: Model) -> None:
    answer = model.answer(GRAMMAR, reasoning_limit=limit(8), temperature=0.0)
    assert answer.error is None
    assert answer.token_ids.index(END) == 8
    digits = model.tokenizer.decode(answer.token_ids[9:])
    assert len(digits) == 3
    assert digits.isdigit()


def test_only_rows_of_running_requests_that_are_sampled_have_masks() -> None:
    """A prompt's chunk, a request without a grammar, one with two drafts, one that has ended, and one's forced end."""
    mask, step = b"\xff", Step(1, [])
    matcher = SimpleNamespace(masks=lambda output, draft: [mask] * (1 + len(draft)))
    for grammar, draft, status, num_samples, reasoning in (
        (matcher, [], Status.RUNNING, 0, limit(0)),
        (None, [], Status.RUNNING, 1, None),
        (matcher, [5, 6], Status.RUNNING, 3, None),
        (matcher, [], Status.FINISHED, 1, limit(0)),
        (matcher, [], Status.RUNNING, 1, limit(0)),
    ):
        request = request_for(reasoning_limit=reasoning)
        request.matcher, request.status = cast(Any, grammar), status
        step.scheduled.append(Scheduled(request, 0, 1, num_samples, draft_token_ids=draft))
    assert step_masks(step) == {1: mask, 2: mask, 3: mask, 5: bytes([0, 0, 2])}


def test_the_answer_is_the_same_however_it_is_computed(model: Model) -> None:
    params: list[dict[str, Any]] = [
        {"reasoning_limit": limit(12), "prompt": "one two three " * 12},  # drafts are accepted, and one is cut short
        {"reasoning_limit": limit(7), "grammar": GRAMMAR},
        # More than the small cache below holds.
        {"reasoning_limit": limit(30), "n": 2, "ignore_eos": True, "max_tokens": 100},
        {"ignore_eos": True, "max_tokens": 100},
    ]
    submits = [model.submit(**{"grammar": None, "temperature": 0.7, "max_tokens": 40} | fields) for fields in params]
    alone = [model.run([submit])[0] for submit in submits]
    for (answer, *_), submit in zip(alone[:3], submits, strict=False):
        reasoning_limit = submit.params.reasoning_limit
        assert reasoning_limit is not None
        assert END in answer.token_ids[: reasoning_limit.max_tokens + 1]
    for mode in ("off", "ngram", "auto"):
        assert model.run(submits, model.engine(speculative=mode)) == alone
    assert model.run(submits, model.engine(speculative="off", overlaps=True)) == alone
    small = model.engine()
    small.scheduler.pool.allocate(small.scheduler.pool.num_free - 8)
    small.scheduler.check = lambda: None  # type: ignore[method-assign]  # the blocks above are nobody's
    assert model.run(submits, small) == alone
    assert small.scheduler.current_stats().preemptions_total > 0
