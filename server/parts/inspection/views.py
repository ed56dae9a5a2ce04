"""Makes what a client sees of the engine's records."""

from itertools import zip_longest
from typing import Any, Literal

from engine.shared.host_memory import available_memory
from engine.shared.messages import EngineInfo
from engine.shared.records import (
    BlockRun,
    Blocks,
    ChoiceName,
    QueuedChoice,
    RequestDetail,
    RequestInfo,
    RequestTimes,
    StepInfo,
    StepRow,
)
from server.parts.inspection.access import RecordAccess
from server.parts.inspection.schemas import (
    BlockGroupView,
    BlockMap,
    BlockOwnerView,
    BlockRunView,
    ChoiceDetail,
    ChunkView,
    EngineView,
    PreemptionView,
    PrefixView,
    QueuedChoiceView,
    RequestView,
    Stages,
    StepRowView,
    StepView,
)


def _name(access: RecordAccess, choice: ChoiceName) -> dict[str, Any]:
    """Return the fields that say which choice it is: None for another client's."""
    if not access.may_see(choice.tenant):
        return {"id": None, "prompt": None, "index": None, "key": None}
    key = access.key_name(choice.tenant)
    return {"id": choice.id, "prompt": choice.prompt, "index": choice.index, "key": key}


def engine_view(access: RecordAccess, info: EngineInfo) -> EngineView:
    """Return the engine's limits."""
    return EngineView(
        engine=access.engine_id,
        device=info.device,
        dtype=info.dtype,
        kernels=info.kernels,
        deterministic=info.deterministic,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        block_size=info.block_size,
        num_blocks=info.num_blocks,
        weight_bytes=info.weight_bytes,
        kv_cache_bytes=info.kv_cache_bytes,
        activation_bytes=info.activation_bytes,
        num_engines=len(access.model.client.engines),
        available_bytes=available_memory(),
    )


def step_view(access: RecordAccess, step: StepInfo) -> StepView:
    """Return a step, in which other clients' rows have no names."""
    return StepView(
        id=step.step_id,
        started=step.started + access.clock_offset,
        seconds=step.seconds,
        num_running=step.num_running,
        num_waiting=step.num_waiting,
        num_blocks_used=step.num_blocks_used,
        rows=[_row_view(access, row) for row in step.rows],
    )


def _row_view(access: RecordAccess, row: StepRow) -> StepRowView:
    return StepRowView(
        **_name(access, row),
        position=row.position if access.may_see(row.tenant) else None,
        num_tokens=row.num_tokens,
        kind="prompt" if row.is_prompt else "generated",
        num_generated=row.num_generated,
        num_drafts=row.num_drafts,
        num_accepted=row.num_accepted,
    )


def queued_view(access: RecordAccess, choice: QueuedChoice, now: float) -> QueuedChoiceView:
    """Return a choice in the queue, without a name if it is another client's."""
    return QueuedChoiceView(
        **_name(access, choice),
        waited=now - choice.queued,
        num_ahead=choice.num_ahead,
        num_tokens=choice.num_tokens,
        was_preempted=choice.was_preempted,
        can_start=choice.can_start,
    )


def block_map(access: RecordAccess, blocks: Blocks, end: int) -> BlockMap:
    """Return how the blocks before number `end` are used. The engine has named only owners that the client may see."""
    return BlockMap(
        engine=access.engine_id,
        block_size=blocks.block_size,
        num_blocks=blocks.num_blocks,
        num_used=blocks.num_used,
        has_more=end < blocks.num_blocks,
        groups=[BlockGroupView(num_layers=group.num_layers, window=group.window) for group in blocks.groups],
        owners=[BlockOwnerView(**_name(access, owner)) for owner in blocks.owners],
        data=[
            BlockRunView(
                start=run.start,
                num_blocks=run.num_blocks,
                state=_block_state(run),
                num_holders=run.num_holders,
                is_cached=run.is_cached,
                owner=run.owner,
                group=run.group,
                position=run.position,
                age=run.age,
            )
            for run in blocks.runs
        ],
    )


def _block_state(run: BlockRun) -> Literal["held", "cached", "free", "unused"]:
    if run.num_holders:
        return "held"
    if run.age is None:
        return "unused"
    return "cached" if run.is_cached else "free"


def stages(times: RequestTimes, now: float) -> Stages:
    """Return the stages of a choice until `now`, or until its end. Times are `time.monotonic()`."""
    end = now if times.finished is None else times.finished
    scheduled = end if times.scheduled is None else times.scheduled
    first_token = end if times.first_token is None else times.first_token
    before, after = times.preempted(end)
    return Stages(
        tokenizing=times.queued - times.arrival,
        queue=scheduled - times.queued,
        prefill=first_token - scheduled - before,
        decode=end - first_token - after,
        preempted=before + after,
    )


def request_view(access: RecordAccess, info: RequestInfo, now: float) -> RequestView:
    """Return a choice. `now` is when the engine reported it."""
    return RequestView(**_fields(access, info, now))


def choice_detail(access: RecordAccess, info: RequestInfo, now: float, detail: RequestDetail) -> ChoiceDetail:
    """Return a choice with what happened to it."""
    times, offset = info.times, access.clock_offset
    return ChoiceDetail(
        **_fields(access, info, now),
        chunks=[
            ChunkView(step=each.step_id, position=each.start, num_tokens=each.num_tokens) for each in detail.chunks
        ],
        preemptions=[
            PreemptionView(at=at + offset, resumed=None if resumed is None else resumed + offset)
            for at, resumed in zip_longest(times.preemptions, times.resumptions)
        ],
        prefix=PrefixView(
            result=detail.prefix.result,
            num_cached_tokens=times.num_cached_tokens,
            num_reusable_tokens=detail.prefix.num_reusable_tokens,
            position=detail.prefix.position,
            token_id=detail.prefix.token_id,
            similar_id=detail.prefix.similar_id,
        ),
    )


def _fields(access: RecordAccess, info: RequestInfo, now: float) -> dict[str, Any]:
    times, offset = info.times, access.clock_offset
    end = now if times.finished is None else times.finished
    return {
        "id": info.ids[0],
        "other_ids": list(info.ids[1:]),
        "prompt": info.prompt,
        "index": info.index,
        "key": access.key_name(info.tenant),
        "model": info.lora_name or access.model.name,
        "state": info.state,
        "finish_reason": info.finish_reason,
        "arrival": times.arrival + offset,
        "wall_s": end - times.arrival,
        "seconds": stages(times, now),
        "first_token": None if times.first_token is None else times.first_token + offset,
        "finished": None if times.finished is None else times.finished + offset,
        "num_ahead": times.num_ahead,
        "num_prompt_tokens": times.num_prompt_tokens,
        "num_cached_tokens": times.num_cached_tokens,
        "num_output_tokens": times.num_output_tokens,
        "num_accepted_tokens": times.num_accepted_tokens,
        "num_preemptions": times.num_preemptions,
        "num_chunks": times.num_chunks,
        "num_blocks": info.num_blocks,
        "engine": access.engine.number,
    }
