"""Engines in this process, without HTTP and speculation."""

import random
from typing import Any

from engine.config import EngineConfig
from engine.core import Engine
from engine.loading import LoadedModel
from engine.shared.messages import SamplingParams, Submit


def engine_with(loaded: LoadedModel, num_streams: int, context: int, max_tokens: int, **settings: Any) -> Engine:
    """Return an engine with `num_streams` random prompts of `context` tokens, of which nothing is cached."""
    config = EngineConfig(model_path="", speculative="off", enable_prefix_caching=False, **settings)
    engine = Engine(config, loaded)
    for number in range(num_streams):
        add_request(engine, f"stream {number}", context, max_tokens)
    return engine


def add_request(engine: Engine, name: str, context: int, max_tokens: int) -> None:
    rng = random.Random(name)
    prompt = [rng.randrange(engine.model_config.num_token_ids) for _ in range(context)]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    engine.add(Submit(request_id=name, prompt_token_ids=prompt, params=params, arrival=0.0))


def run_all(engine: Engine) -> None:
    while engine.has_work:
        engine.step()
