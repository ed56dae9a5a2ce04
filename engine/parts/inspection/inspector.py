"""Computes a part of a request again to show what happens inside: between steps, a little at a time.

Rows are computed by the kernels that serve, and a row's result does not depend on others, so it is bit for bit what the
request got. Only free blocks are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from engine.core import Engine
from engine.loading import AdapterGoneError
from engine.parts.inspection.executions import ObservedExecution
from engine.parts.inspection.layers import LayerObserver, view_stages
from engine.parts.inspection.reader import all_choices, has_id, of_one_request
from engine.parts.inspection.recorder import BORROWED, Recorder, is_prefix, notes_of
from engine.parts.inspection.records import Candidate, Inspect, Inspected, InspectionProblem, PositionView, StageView
from engine.sampling.sampler import Sampler, step_masks
from engine.scheduling.block_pool import Block, BlockPool
from engine.scheduling.kv_manager import KVManager
from engine.scheduling.request import (
    BlockTable,
    Request,
    SamplingRow,
    Scheduled,
    Status,
    Step,
    choice_seed,
    new_request,
    without_early_end,
)
from engine.shared.block_hashes import STATE_SUFFIX, extend_block_hashes, prefix_salt
from engine.shared.messages import SamplingParams, Submit

MAX_ROWS = 64  # that are computed at once
MAX_PRODUCTS = 1 << 19  # of queries and keys of a layer that are computed at once
SHARE_OF_STEPS = 0.05  # of the time of steps that may be spent between them
IDLE_SECONDS = 0.005  # that may be spent before messages are received, if there are no steps
MAX_SECONDS = 60.0  # of an inspection: others wait for it
DEFAULT_POSITIONS = 16  # the last ones of a request

PARAMS = SamplingParams(max_tokens=1)  # of a prompt

# What has ended: the API process that has asked, the number of its question, and the answer; None: it has failed.
Inspection = tuple[bytes, int, Inspected | None]

logger = logging.getLogger("lightwell.engine")


class InspectionError(Exception):
    """There is nothing to show."""

    def __init__(self, problem: InspectionProblem, num_tokens: int = 0) -> None:
        super().__init__(problem.value)
        self.problem = problem
        self.num_tokens = num_tokens


@dataclass(frozen=True, slots=True)
class Target:
    """The tokens that are computed again, and how they were sampled."""

    token_ids: list[int]  # prompt and output
    num_prompt_tokens: int
    params: SamplingParams
    index: int  # which of the prompt's choices
    salt: bytes  # of cached prefixes
    lora_name: str
    lora_fingerprint: str
    ids: tuple[str, ...] = ()  # of the request; empty: it is only a prompt

    def positions(self, question: Inspect) -> tuple[int, int]:
        """Return the range that is asked for. Raises InspectionError if there is no such range."""
        num_tokens = len(self.token_ids)
        last = num_tokens if question.id is None else max(1, num_tokens - 1)  # nothing follows the last token
        last = min(last, question.max_end)
        end = last if question.end is None else question.end
        first = 0 if question.id is None else max(0, end - min(DEFAULT_POSITIONS, question.max_positions))
        start = first if question.start is None else question.start
        if not 0 <= start < end <= min(num_tokens, question.max_end) or end - start > question.max_positions:
            raise InspectionError(InspectionProblem.OUT_OF_RANGE, num_tokens)
        return start, end


@dataclass(slots=True)
class Sampled:
    """What the sampler chooses at each position, and how it does at the last one."""

    token_ids: list[int | None]  # None: the next token is one of the prompt
    stages: list[StageView] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Running:
    """The inspection that runs."""

    identity: bytes  # of the API process that asks for it
    number: int  # of the question
    slices: Generator[None, None, Inspected]
    deadline: float  # in seconds of the engine's clock


class Inspector:
    """Runs one inspection at a time, in slices."""

    def __init__(self, engine: Engine, recorder: Recorder) -> None:
        self._engine = engine
        self._recorder = recorder
        self._clock = engine.clock
        self._num_heads = max(attention.num_heads for attention in engine.model_config.attentions.values())
        self._execution: ObservedExecution | None = None  # made for the first inspection
        self.running: Running | None = None
        self._seconds = 0.0  # that slices may take now; negative: they have taken too long

    def begin(self, identity: bytes, number: int, question: Inspect) -> Inspected | None:
        """Begin an inspection for the API process `identity`. Return the refusal if another one runs."""
        if self.running is not None:
            return Inspected(problem=InspectionProblem.BUSY)
        self.running = Running(identity, number, self._inspect(question), self._clock() + MAX_SECONDS)
        return None

    def stop(self, identity: bytes, number: int) -> bool:
        """End an inspection whose answer nobody waits for. Return False if another one runs, or none."""
        running = self.running
        if running is None or (identity, number) != (running.identity, running.number):
            return False
        running.slices.close()
        self.running = None
        return True

    def advance_after(self, step_seconds: float | None) -> Inspection | None:
        """Run slices for a share of the time of steps. `step_seconds` is that of the last one; None: there was none."""
        started = self._clock()
        self._seconds = IDLE_SECONDS if step_seconds is None else self._seconds + SHARE_OF_STEPS * step_seconds
        reply = self.advance(self._seconds) if self._seconds > 0 else None
        self._seconds = min(0.0, self._seconds - (self._clock() - started))  # what is too much, later ones wait for
        return reply

    @torch.inference_mode()
    def advance(self, seconds: float) -> Inspection | None:
        """Run slices for so many seconds, at least one. Return what has ended: who asked for it, and the answer."""
        if (running := self.running) is None:
            return None
        now = self._clock()
        has_ended, answer = _run(running.slices, now + seconds, self._clock)
        if not has_ended and now > running.deadline:
            running.slices.close()
            has_ended, answer = True, Inspected(problem=InspectionProblem.TOO_SLOW)
        if not has_ended:
            return None
        self.running = None
        return running.identity, running.number, answer

    def _inspect(self, question: Inspect) -> Generator[None, None, Inspected]:
        """Yield after each slice. Raises InspectionError or AdapterGoneError."""
        engine = self._engine
        target = self._target(question)
        start, end = target.positions(question)
        kv = engine.scheduler.kv
        if kv.pool.num_blocks_for(end) * len(kv.groups) > kv.pool.num_blocks:
            raise InspectionError(InspectionProblem.TOO_LONG, len(target.token_ids))
        if self._execution is None:
            self._execution = engine.runner.new_observed_execution(MAX_ROWS)
            yield
        request = self._request(target)
        request.token_ids = target.token_ids[:end]
        seen = yield from self._look(request, target, start, question)
        logits = [row for observer in seen for row in observer.logits]
        sampled = yield from self._sample(request, target, start, logits, question.top)
        attention = [row for observer in seen for row in observer.attention] or [b""] * len(logits)
        layers = [row for observer in seen for row in observer.views()]
        config = engine.model_config
        return Inspected(
            num_tokens=len(target.token_ids),
            ids=target.ids,
            lora_name=target.lora_name,
            token_ids=target.token_ids[: end + 1],
            num_prompt_tokens=target.num_prompt_tokens,
            start=start,
            end=end,
            num_heads=self._num_heads,
            num_experts=max(layer.experts.router.num_experts if layer.experts else 0 for layer in config.layers),
            positions=list(map(PositionView, range(start, end), layers, attention, sampled.token_ids)),
            stages=sampled.stages,
            candidates=sampled.candidates,
        )

    def _look(
        self, request: Request, target: Target, start: int, question: Inspect
    ) -> Generator[None, None, list[LayerObserver]]:
        """Compute a request, and return what was seen of its steps from position `start` on."""
        engine, execution = self._engine, self._execution
        assert execution is not None
        seen: list[LayerObserver] = []
        with closing(BorrowedBlocks(engine.scheduler.kv, request, start)) as blocks:
            for number, (first, last) in enumerate(pairwise(self._bounds(request, start))):
                if blocks.states:
                    request.kv.states[last] = blocks.states[number % 2]
                step = Step(0, [Scheduled(request, first, last - first, num_samples=0)])
                execution.builder.build(step)
                slices: Iterator[object] = execution.forward()
                if first >= start:
                    seen.append(LayerObserver(engine.runner, request, first, question))
                    slices = seen[-1].run(execution)
                for _ in slices:
                    yield
                    blocks.check()
                    engine.adapters.check(request.lora_slot, target.lora_fingerprint)
        return seen

    def _target(self, question: Inspect) -> Target:
        """Return what is inspected. Raises InspectionError."""
        if question.id is None:
            prompt = question.prompt_token_ids
            fingerprint = question.lora_fingerprint
            salt = prefix_salt(fingerprint, "")
            return Target(prompt, len(prompt), PARAMS, 0, salt, question.lora_name, fingerprint)
        choices = of_one_request([pair for pair in all_choices(self._recorder) if has_id(pair[0], question)])
        place = (question.prompt, question.index)
        chosen = [pair for pair in choices if (pair[0].submit.prompt, pair[0].index) == place]
        if not chosen:
            raise InspectionError(InspectionProblem.NOT_FOUND)
        (record, living), *_ = chosen
        token_ids = notes_of(record).token_ids if living is None else living.token_ids
        if token_ids is None or not self._recorder.keeps_tokens:
            raise InspectionError(InspectionProblem.NOT_KEPT)
        return Target(
            list(token_ids),
            record.num_prompt_tokens,
            record.submit.params,
            record.index,
            notes_of(record).salt if living is None else living.kv.salt,
            record.submit.lora_name,
            record.submit.lora_fingerprint,
            record.submit.ids,
        )

    def _request(self, target: Target) -> Request:
        """Return a request for a target, of which the scheduler does not know. Raises AdapterGoneError."""
        engine, params = self._engine, target.params
        slot = engine.adapters.find(target.lora_fingerprint)
        prompt = target.token_ids[: target.num_prompt_tokens]
        submit = Submit(request_id="inspection", prompt_token_ids=prompt, params=params, arrival=0.0)
        request = new_request(submit, salt=target.salt, arrival_number=0, now=0.0, lora_slot=slot)
        request.seed = choice_seed(params.seed, target.index)
        request.status = Status.RUNNING
        if params.grammar is not None:
            request.matcher = engine.grammars.new_matcher(params)
            request.params = without_early_end(params)
        return request

    def _bounds(self, request: Request, start: int) -> Iterator[int]:
        """Yield the first row of each step, and the end. Prompt and output are never in one step."""
        position, end = request.kv.num_computed, request.num_tokens
        num_observed = max(1, min(MAX_ROWS, MAX_PRODUCTS // (self._num_heads * end)))
        while position < end:
            yield position
            limits = [limit for limit in (start, request.num_prompt_tokens, end) if limit > position]
            position = min(position + (MAX_ROWS if position < start else num_observed), *limits)
        yield end

    def _sample(
        self, request: Request, target: Target, start: int, logits: Sequence[Tensor], num_top: int
    ) -> Generator[None, None, Sampled]:
        """Sample after each position of the output that was asked for, and view the stages of the last one."""
        sampled = Sampled([None] * len(logits))
        needs_earlier = "mirostat" in request.params.order and start > request.num_prompt_tokens - 1
        if target.ids == () or needs_earlier:
            return sampled
        while not request.can_start:
            request.wait_for_grammar(IDLE_SECONDS / 2)
            yield
        runner = self._engine.runner
        for number, row_logits in enumerate(logits):
            position = start + number
            if position < request.num_prompt_tokens - 1:
                continue
            request.token_ids = target.token_ids[: position + 1]
            row = SamplingRow(request)
            masks = step_masks(Step(0, [Scheduled(request, position, 1, num_samples=1)]))
            if number == len(logits) - 1:
                sampler = Sampler(len(row_logits), self._engine.model_config.eos_token_ids, row_logits.device)
                yield
                stages = view_stages(sampler, row_logits[None], row, masks, num_top)
                sampled.stages, sampled.candidates = yield from stages
            output = runner.sampler.sample(row_logits[None].clone(), [row], masks)
            sampled.token_ids[number] = int(output.token_ids[0]) if output.is_finite[0] else None
            yield
        return sampled


def _run(
    slices: Generator[None, None, Inspected], deadline: float, clock: Callable[[], float]
) -> tuple[bool, Inspected | None]:
    """Run slices until the deadline, at least one. Return whether they have ended, and the answer unless they fail."""
    try:
        while True:
            next(slices)
            if clock() >= deadline:
                return False, None
    except StopIteration as end:
        return True, end.value
    except InspectionError as error:
        return True, Inspected(problem=error.problem, num_tokens=error.num_tokens)
    except AdapterGoneError:
        return True, Inspected(problem=InspectionProblem.NO_ADAPTER)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException:  # a panic of a library in Rust is no Exception
        logger.exception("an inspection fails")
        return True, None


# Free blocks of the KV cache in which tokens are computed again, and free states. Requests get them back whenever they
# need them.


class BorrowedBlocks:
    """The block tables of a request that the scheduler does not know, and the states that its steps write in turn.

    The beginning may be cached for other requests: these blocks, and the snapshot after them, are only read.
    """

    def __init__(self, kv: KVManager, request: Request, num_computed: int) -> None:
        """Fill the tables of a request. At most the first `num_computed` tokens are taken from the prefix cache.

        Raises InspectionError.
        """
        pool, states = kv.pool, kv.state_pool
        num_prompt_tokens = request.num_prompt_tokens if pool.separates_prompts else None
        hashes: list[bytes] = []
        beginning = request.token_ids[:num_computed]
        extend_block_hashes(hashes, beginning, pool.block_size, request.kv.salt, num_prompt_tokens)
        num_cached = kv.num_cached_blocks(hashes[: _num_published(kv, hashes)])
        num_new = pool.num_blocks_for(request.num_tokens) - num_cached
        self._used: list[tuple[BlockPool, Block, bytes]] = []  # with the hash that they keep meanwhile
        cached = [self._use(pool, [each + suffix for each in hashes[:num_cached]]) for suffix in kv.suffixes]
        if states.num_blocks and num_cached:
            (snapshot,) = self._use(states, [hashes[num_cached - 1] + STATE_SUFFIX])
            request.kv.states[num_cached * pool.block_size] = snapshot
        blocks = self._borrow(pool, num_new * len(kv.groups))
        self.states = self._borrow(states, min(2, states.num_blocks))
        for number, found in enumerate(cached):
            table = BlockTable()
            table.append(found + blocks[number * num_new : (number + 1) * num_new])
            request.kv.tables.append(table)
        request.kv.num_computed = num_cached * pool.block_size

    def check(self) -> None:
        """Raise InspectionError if a block has been handed out since."""
        if any(block.block_hash != block_hash for _, block, block_hash in self._used):
            raise InspectionError(InspectionProblem.NO_BLOCKS)

    def close(self) -> None:
        """Give back what has not been handed out."""
        for pool, block, block_hash in self._used:
            if block.block_hash == block_hash and not is_prefix(block_hash):
                pool.discard(block)

    def _use(self, pool: BlockPool, hashes: Sequence[bytes]) -> list[Block]:
        """Return the blocks that are published under these hashes."""
        found = [(pool, pool.published[block_hash], block_hash) for block_hash in hashes]
        self._used += found
        return [block for _, block, _ in found]

    def _borrow(self, pool: BlockPool, num_blocks: int) -> list[Block]:
        """Return free blocks that may be written to as long as they have the same hash. Raises InspectionError.

        They stay free, like those of a cached prefix that was used just now.
        """
        blocks = pool.allocate(num_blocks)
        if blocks is None:
            self.close()
            raise InspectionError(InspectionProblem.NO_BLOCKS)
        hashes = [BORROWED + block.block_id.to_bytes(8) for block in blocks]
        for block, block_hash in zip(blocks, hashes, strict=True):
            pool.publish(block, block_hash)
        pool.release(blocks)
        return self._use(pool, hashes)


def _num_published(kv: KVManager, hashes: Sequence[bytes]) -> int:
    """Return the length of the longest prefix of blocks that are published in all groups."""
    for index, block_hash in enumerate(hashes):
        if not all(block_hash + suffix in kv.pool.published for suffix in kv.suffixes):
            return index
    return len(hashes)
