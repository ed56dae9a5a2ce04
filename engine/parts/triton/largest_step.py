"""Measures how much memory of a GPU a step takes: with the largest one that the limits allow, of made-up requests."""

from __future__ import annotations

import torch

from engine.config import EngineConfig
from engine.loading import Limits, new_runner
from engine.model import CausalLM
from engine.model.memory_plan import MIB, CudaMemory, MemoryPlan, free_memory, is_out_of_memory
from engine.scheduling.block_pool import Block
from engine.scheduling.record import StepClock
from engine.scheduling.request import BlockTable, Request, Scheduled, Status, Step, new_request
from engine.shared.messages import SamplingParams, Submit

# The usual settings that take the most memory.
SAMPLING = SamplingParams(
    max_tokens=1 << 30,
    temperature=1.0,
    top_p=0.9,
    repetition_penalty=1.1,
    frequency_penalty=0.1,
    presence_penalty=0.1,
    logprobs=20,
)


def measure_activations(card: CudaMemory, model: CausalLM, limits: Limits, config: EngineConfig) -> None:
    """Measure the memory of the largest step. Raises ValueError, with the settings that help, if it does not fit."""
    free = free_memory(card.device)
    try:
        card.measure(lambda: run_largest_step(model, limits, config.block_size, card.device))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"a step of --max-num-batched-tokens {limits.max_num_batched_tokens} and --max-num-seqs "
            f"{limits.max_num_seqs} does not fit into {free // MIB} MiB, which is what the weights leave "
            f"free; lower either{', or use --quantization int8' if config.quantization != 'int8' else ''}"
        ) from error


def run_largest_step(model: CausalLM, limits: Limits, block_size: int, device: torch.device) -> None:
    """Run a step with all rows and all samples that the limits allow, on a KV cache of one block and two states.

    All its sequences share these: what is in them is of no interest.
    """
    num_groups = len(model.config.kv_groups)
    step = largest_step(
        limits.max_num_batched_tokens, limits.max_num_seqs, limits.max_model_len, block_size, num_groups
    )
    num_states = 2 if model.config.mixers else 0
    memory = MemoryPlan(1, block_size, 0, 1, limits.max_model_len, num_states=num_states)
    runner = new_runner(model, limits, memory, device)
    clock = StepClock()
    runner.sample(step, runner.forward(step, clock), clock).read()


def largest_step(
    max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int
) -> Step:
    """Return a step of `max_num_batched_tokens` rows that samples for `max_num_seqs` requests.

    As many requests as possible generate, one of them at the end of the longest context; the others read prompts. All
    tokens and all blocks are number 0.
    """
    num_extra = min(max_num_batched_tokens, max_num_seqs * max_model_len) - max_num_seqs
    prompts: list[Scheduled] = []
    while num_extra > 0:
        num_tokens = min(num_extra + 1, max_model_len)
        num_extra -= num_tokens - 1
        prompts.append(_scheduled(num_tokens, 0, num_tokens, block_size, num_groups))
    generating: list[Scheduled] = []
    for index in range(max_num_seqs - len(prompts)):
        length = max_model_len if index == 0 else min(2, max_model_len)
        generating.append(_scheduled(max(1, length - 1), length - 1, 1, block_size, num_groups))
    return Step(0, generating + prompts)


def _scheduled(num_prompt_tokens: int, start: int, num_tokens: int, block_size: int, num_groups: int) -> Scheduled:
    """Return the rows start .. start + num_tokens, the last ones of a request."""
    submit = Submit(request_id="largest step", prompt_token_ids=[0] * num_prompt_tokens, params=SAMPLING, arrival=0.0)
    request: Request = new_request(submit, salt=b"", arrival_number=0, now=0.0)
    end = start + num_tokens
    request.token_ids = [0] * end
    request.kv.num_computed = end
    for _ in range(num_groups):
        table = BlockTable()
        table.append([Block(0)] * -(-end // block_size))
        request.kv.tables.append(table)
    request.kv.states = {start: Block(0), end: Block(1)}
    request.status = Status.RUNNING
    return Scheduled(request, start, num_tokens, num_samples=1)
