"""`/lightwell/v1/trace` and `/lightwell/v1/requests/{id}/trace`: what the engine did, on a time axis."""

import math
import time
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from engine.shared.records import ReadRequests, ReadSteps, RequestInfo, Requests, Steps
from server.parts.inspection.access import EngineNumber, RecordAccess, check_may_read
from server.parts.inspection.routes import read_request
from server.parts.inspection.schemas import Trace, TraceInfo
from server.parts.inspection.trace_events import Args, TraceBuilder
from server.parts.inspection.views import request_view

STEPS_AT_A_TIME = 256  # between them, other requests are served
MAX_QUESTIONS = 40  # for steps
MAX_TRACED = 256  # choices
MAX_SECONDS = 600

# What Perfetto shows of a choice.
SHOWN: tuple[str, ...] = ("id", "prompt", "index", "key", "model", "state", "finish_reason")
SHOWN += ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "num_accepted_tokens", "num_preemptions")

router = APIRouter(dependencies=[Depends(check_may_read)])


@router.get("/lightwell/v1/trace")
async def trace_engine(
    request: Request,
    seconds: Annotated[
        float, Query(gt=0, le=MAX_SECONDS, allow_inf_nan=False, description="How far back the trace goes.")
    ] = 10.0,
    engine: EngineNumber = 0,
) -> Response:
    """Return the last steps, and the choices that have not ended before them, in Chrome's trace format."""
    access, since = RecordAccess(request, engine), time.monotonic() - seconds
    trace = TraceBuilder(access.clock_offset)
    is_complete = await _add_steps(access, trace, since)
    answer = await access.ask(ReadRequests(tenant=access.own_name, since=since, limit=MAX_TRACED))
    assert isinstance(answer, Requests)
    return await access.respond(_whole, access, trace, answer, is_complete)


@router.get("/lightwell/v1/requests/{request_id}/trace")
async def trace_request(request: Request, request_id: str) -> Response:
    """Return one request, and the steps from its beginning to its end, in Chrome's trace format."""
    access, answer = await read_request(RecordAccess(request), request_id)
    times = [info.times for info in answer.requests]
    since = min(each.queued for each in times)
    until = max(answer.now if each.finished is None else each.finished for each in times)
    trace = TraceBuilder(access.clock_offset)
    is_complete = await _add_steps(access, trace, since, until)
    return await access.respond(_whole, access, trace, answer, is_complete)


async def _add_steps(access: RecordAccess, trace: TraceBuilder, since: float, until: float = math.inf) -> bool:
    """Add the steps that started between two times. Return whether these are all."""
    after: int | None = None
    num_lost = 0
    for _ in range(MAX_QUESTIONS):
        answer = await access.ask(ReadSteps(after=after, since=since, limit=STEPS_AT_A_TIME))
        assert isinstance(answer, Steps)
        num_lost += answer.num_lost
        await access.run(trace.add_steps, [step for step in answer.steps if step.started <= until])
        if not answer.has_more or answer.steps[-1].started > until:
            return num_lost == 0
        after = answer.steps[-1].step_id
    return False


def _whole(access: RecordAccess, trace: TraceBuilder, answer: Requests, is_complete: bool) -> Trace:
    """Add the choices to the steps. `is_complete`: these are all."""
    for info in sorted(answer.requests, key=_queued):
        if info.detail is not None:
            view = request_view(access, info, answer.now)
            args: Args = {name: getattr(view, name) for name in SHOWN}
            trace.add_choice(_name(info), info.times, info.detail, answer.now, args)
    about = TraceInfo(engine=access.engine_id, is_complete=is_complete and not answer.has_more)
    return Trace(trace_events=trace.events, other_data=about)


def _queued(info: RequestInfo) -> tuple[float, int, int]:
    return info.times.queued, info.prompt, info.index


def _name(info: RequestInfo) -> str:
    return f"{info.ids[0]} {info.prompt}.{info.index}"
