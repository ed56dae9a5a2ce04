"""Outputs of the engine, for comparison with another implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder, BatchLimits
from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel
from engine.runner import ModelRunner
from engine.scheduling.block_pool import Block
from engine.scheduling.request import BlockTable, Scheduled, Step
from tests.support.submits import new_submit, request_for


def runner_with(loaded: LoadedModel, num_tokens: int, num_seqs: int) -> ModelRunner:
    """Return a runner of the same weights and KV memory whose steps may have so many tokens and sequences."""
    runner, model_len, block_size = loaded.runner, loaded.limits.max_model_len, loaded.memory.block_size
    limits = BatchLimits(num_tokens, num_seqs, model_len, block_size, loaded.config.num_token_ids)
    groups, planners = len(loaded.config.kv_groups), runner.builder.planners
    fill_states = runner.builder.fill_states
    builder = BatchBuilder(limits, loaded.device, num_groups=groups, planners=planners, fill_states=fill_states)
    return ModelRunner(runner.model, runner.kv_cache, builder, runner.sampler, runner.kernels)


def all_logits(
    loaded: LoadedModel, prompt: Sequence[int], lora_name: str = "", *, is_generated: bool = False
) -> Tensor:
    """Return the logits of every position [n, V] of a prompt, or of generated tokens, computed in one forward pass."""
    request = request_for(prompt)
    request.num_prompt_tokens = 0 if is_generated else len(prompt)
    request.lora_slot = loaded.adapters.find(fingerprint_of(loaded, lora_name))
    block_size = loaded.memory.block_size
    num_blocks, num_groups = -(-len(prompt) // block_size), len(loaded.config.kv_groups)
    for first in range(0, num_groups * num_blocks, num_blocks):
        table = BlockTable()
        table.append([Block(first + index) for index in reversed(range(num_blocks))])
        request.kv.tables.append(table)
    request.kv.states = {len(prompt): Block(0)}
    runner = runner_with(loaded, len(prompt), 1)  # the prompt may be longer than the token budget of the engine's steps
    execution = runner.execution
    with torch.inference_mode():
        execution.forward(runner.builder.build(Step(1, [Scheduled(request, 0, len(prompt), num_samples=len(prompt))])))
        return execution.compute_logits(torch.arange(len(prompt))).clone()


def fingerprint_of(loaded: LoadedModel, lora_name: str) -> str:
    """Return the fingerprint of a loaded adapter, by which requests identify its weights; "" for no adapter."""
    adapters = {adapter.name: adapter.fingerprint for adapter in loaded.adapters.loaded()}
    return adapters[lora_name] if lora_name else ""


def greedy_outputs(
    loaded: LoadedModel, prompts: Sequence[list[int]], num_tokens: int, lora_names: Sequence[str] = ()
) -> list[list[int]]:
    """Return `num_tokens` greedy tokens for each prompt; the engine runs all prompts together."""
    engine = Engine(EngineConfig(model_path=""), loaded)
    for number, (prompt, name) in enumerate(zip(prompts, lora_names or [""] * len(prompts), strict=True)):
        adapter = {"lora_name": name, "lora_fingerprint": fingerprint_of(loaded, name)}
        engine.add(new_submit(prompt, f"{number}", max_tokens=num_tokens, temperature=0.0, ignore_eos=True, **adapter))
    outputs: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for event in engine.step()[1]:
            assert event.error is None
            outputs[int(event.request_id)] += event.token_ids
    assert all(len(output) == num_tokens for output in outputs)
    return outputs
