"""The loader on kernels with sanitizers, which are preloaded: `python -m tests.fuzz.sanitized_loader CODE_PATH`.

Weights, buffers and the caches of layers are allocations of their own, so that an access beyond one of them is seen.
The caches are filled with NaN, so that what reads a place that was not written gets logits that are not finite.
"""

import random
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import EngineConfig, KVShape, ModelConfig
from engine.core import Engine
from engine.kernels import lazy_memory
from engine.kernels.cpu import attention
from engine.kernels.cpu import library as compiled
from engine.kernels.interface import LayerCache
from engine.loading import LoadedModel
from engine.parts.build_kernels.build import build
from engine.parts.hybrid import mixers
from engine.shared.messages import SamplingParams, Submit
from engine.startup import warm_up
from tests.fuzz import loader
from tests.support.answers import Answers, assert_same, run

SEED = 28
PROMPT_LENGTHS = (70, 9, 41)  # the first and the last are longer than the windows of the models
NUM_GENERATED = 4

shared_kv_cache = attention.new_kv_cache


def allocate(num_bytes: int) -> Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def new_kv_cache(
    dtype: torch.dtype, groups: Sequence[Sequence[KVShape]], num_blocks: int, block_size: int
) -> list[list[LayerCache]]:
    """Return caches that share no memory."""

    def cache(shape: KVShape) -> LayerCache:
        ((only,),) = shared_kv_cache(dtype, [[shape]], num_blocks, block_size)
        return only

    return [[cache(shape) for shape in group] for group in groups]


def new_states(config: ModelConfig, num_states: int, device: torch.device) -> dict[int, Tensor]:
    """Return states of layers that share no memory."""
    return {
        index: torch.zeros(num_states, mixers.state_size(spec), device=device) for index, spec in config.mixers.items()
    }


def answer_requests(config: EngineConfig, loaded: LoadedModel) -> None:
    """Run requests alone and then together: the answers must be the same, to the bit."""
    engine = Engine(config, loaded)
    warm_up(engine, loaded.limits.max_model_len)
    cache = loaded.runner.kv_cache
    layers = [stored for layer in cache.layers.values() for stored in (layer.keys, layer.values)]
    for stored in (*layers, *cache.states.values()):
        stored.fill_(torch.nan)
    rng, longest, num_ids = random.Random(SEED), loaded.limits.max_model_len, loaded.config.num_token_ids
    num_generated = min(NUM_GENERATED, longest)
    params = SamplingParams(max_tokens=num_generated, temperature=0.0, logprobs=0, ignore_eos=True)
    submits = []
    for length in PROMPT_LENGTHS:
        prompt = [num_ids - 1, *rng.choices(range(num_ids), k=max(1, min(length, longest - num_generated)) - 1)]
        submits.append(Submit(request_id=str(length), prompt_token_ids=prompt, params=params, arrival=0.0))
    alone: Answers = {}
    for submit in submits:
        alone |= run(engine, [submit])
    assert_same(run(Engine(config, loaded), submits), alone)


def main(code_path: str) -> None:
    library = build(code_path, sanitize=True)
    lazy_memory._huge_pages = allocate
    lazy_memory.Arena.take = lambda self, num_bytes: allocate(num_bytes)  # type: ignore[method-assign]
    compiled.find_library = lambda code_path: library  # type: ignore[assignment, misc]
    attention.new_kv_cache, mixers.new_states = new_kv_cache, new_states
    compiled.best_code_path = lambda: code_path
    loader.main(answer_requests)


if __name__ == "__main__":
    main(*sys.argv[1:])
