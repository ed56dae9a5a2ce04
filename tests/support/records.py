"""Records of a fake engine, and what it answers to questions about its inside."""

import time
from array import array
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from engine.parts.inspection import records
from engine.parts.inspection.reader import choice_detail
from engine.parts.inspection.records import StepRowView, StepView
from engine.scheduling.record import Chunk, RequestRecord
from tests.support.fake_engine import FakeEngine, Running

T = TypeVar("T", bound=msgspec.Struct)


def make(kind: type[T], *values: Any, **fields: Any) -> T:
    """Return a struct whose first fields, but `object`, have these values."""
    names = [name for name in kind.__struct_fields__ if name != "object"]
    return kind(**dict(zip(names, values, strict=False)), **fields)


def example_step(step_id: int = 7, tenants: tuple[str, ...] = ("",), **others: Any) -> StepView:
    """Return a step with a row of each tenant, whose requests are called `of-` and its name."""
    rows = [
        make(StepRowView, f"of-{tenant}", 0, 1, tenant, 40 + number, 3, "generated", 2, 2, 1)
        for number, tenant in enumerate(tenants)
    ]
    fields: dict[str, Any] = {"started": 1.0, "seconds": {"forward": 0.5}, "num_running": 2, "num_waiting": 1}
    return StepView(id=step_id, rows=rows, **fields | {"num_blocks_used": 3} | others)


def answer(engine: FakeEngine, question: bytes) -> bytes:
    """Return the answer of a fake engine to a question."""
    answers: dict[type, Callable[[FakeEngine, Any], records.Answer]] = {
        records.ReadSteps: _steps_after,
        records.ReadQueue: _queue,
        records.ReadBlocks: _blocks,
        records.ReadRequests: _requests,
        records.Inspect: _inspected,
    }
    asked: Any = msgspec.msgpack.decode(question, type=records.Question)
    return msgspec.msgpack.encode(answers[type(asked)](engine, asked))


def _steps_after(engine: FakeEngine, question: records.ReadSteps) -> records.StepList:
    steps, after = msgspec.convert(engine.config.steps, list[StepView]), question.after
    num_lost, has_more = 0, False
    if after is None and question.since is None:
        shown = steps[-question.limit :]
    else:
        num_lost = 0 if after is None or not steps else max(0, steps[0].id - after - 1)
        later = [step for step in steps if step.id > (after or 0) and step.started >= (question.since or 0.0)]
        shown, has_more = later[: question.limit], len(later) > question.limit
    return make(records.StepList, "", engine.config.num_blocks, num_lost, has_more, shown)


def _name(choice: Running) -> tuple[str, int, int, str]:
    return choice.submit.ids[0], choice.submit.prompt, choice.index, choice.submit.tenant


def _queue(engine: FakeEngine, question: records.ReadQueue) -> records.QueueList:
    now, rest = time.monotonic(), (False, True)
    choices = [
        make(records.QueuedChoiceView, *_name(each), now - each.queued, place, len(each.submit.prompt_token_ids), *rest)
        for place, each in enumerate(engine.waiting)
    ]
    return records.QueueList(num_waiting=len(choices), data=choices[: question.limit])


def _blocks(engine: FakeEngine, question: records.ReadBlocks) -> records.BlockMap:
    """Return a pool in which each running choice holds a block; one more is cached, and one was never used."""
    named = [choice for choice in engine.running if question.tenant in (None, choice.submit.tenant)]
    owners = [named.index(choice) if choice in named else None for choice in engine.running]
    rows: list[tuple[Any, ...]] = [("held", 1, False, owner, 0, None if owner is None else 32, 5) for owner in owners]
    rows += [("cached", 0, True, None, None, None, 9), ("unused", 0, False, None, None, None, None)]
    runs = [make(records.BlockRunView, number, 1, *row) for number, row in enumerate(rows)]
    groups, shown = (
        [make(records.BlockGroupView, 2, None)],
        [make(records.BlockOwnerView, *_name(each)) for each in named],
    )
    has_more = question.start + question.limit < len(runs)
    return make(records.BlockMap, "", 32, len(runs), len(owners), 0, 0, 0, has_more, groups, shown, runs)


def _inspected(engine: FakeEngine, question: records.Inspect) -> records.Inspected:
    """Return what happens in a model of two layers with one head, of a prompt or of a running choice."""
    if (problem := engine.config.inspection_problem) is not None:
        return records.Inspected(problem=records.InspectionProblem(problem), num_tokens=3)
    token_ids, ids = question.prompt_token_ids, tuple[str, ...]()
    if question.id is not None:
        submits = [choice.submit for choice in engine.running if question.id in choice.submit.ids]
        submits = [submit for submit in submits if question.tenant in (None, submit.tenant)]
        if not submits:
            return records.Inspected(problem=records.InspectionProblem.NOT_FOUND)
        token_ids, ids = [*submits[0].prompt_token_ids, 98], submits[0].ids
    layer = records.LayerView([(97, -0.5)], 1.0, 2.0, 3.0, [[(0, 0.75)]], [], (0.9, 0.25))
    num_prompt_tokens = len(token_ids) - len(ids[:1])
    end = min(num_prompt_tokens, question.end or num_prompt_tokens)
    stages = [("logits", 3, 0, [(97, -0.5)], []), ("top_k", 1, 2, [(98, 0.0)], [(97, -0.5)])]
    attention = array("f", [0.75, 0.25]).tobytes()
    return records.Inspected(
        num_tokens=len(token_ids),
        ids=ids,
        lora_name=question.lora_name,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
        start=end - 1,
        end=end,
        num_heads=1,
        positions=[records.PositionView(end - 1, [layer, layer], attention, 98 if ids else None)],
        stages=[records.StageView(*stage) for stage in stages if ids],
        candidates=[records.Candidate(98, 1.5, 0.5)] if ids else [],
    )


def _requests(engine: FakeEngine, question: records.ReadRequests) -> records.Requests:
    """Return the choices that have not ended, like the reader of the real engine."""
    choices = [
        choice
        for choice in (*engine.waiting, *engine.running)
        if question.tenant in (None, choice.submit.tenant) and question.id in (None, *choice.submit.ids)
    ]
    now = time.monotonic()
    infos = [records.RequestInfo(_detail(engine, choice, now), engine.times(choice, None)) for choice in choices]
    return records.Requests(now=now, requests=infos, has_more=False)


def _detail(engine: FakeEngine, choice: Running, now: float) -> records.ChoiceDetail:
    """Return a choice that has computed its prompt in one step."""
    known = msgspec.structs.asdict(engine.times(choice, None))
    record = RequestRecord(submit=choice.submit, index=choice.index, **known, chunks=[Chunk(1, 0, 4)])
    view = choice_detail(record, None, now, make(records.PrefixView, "new", 0, 0, 0, None, None, None), has_chunks=True)
    view.state = "running" if choice in engine.running else "waiting"
    return view
