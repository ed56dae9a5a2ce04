"""Where the time of a step goes: `python tests/bench/profile_step.py [--rows 1 8 32] [--context 160] [MODEL]`.

Runs the engine in this process, without HTTP. The parts of a step come from its own records, the operations of the
forward pass from clocks around the kernels; what remains is Python and torch between them.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from engine.config import EngineConfig
from engine.core import Engine
from engine.messages import SamplingParams, Submit
from engine.record import StepRecord
from engine.runner import LoadedModel, load_model
from server.models import resolve_model

OPERATIONS = ("rms_norm", "add_rms_norm", "rope_and_store_kv", "plan_attention", "paged_attention", "act_and_mul")


class Clocks:
    """Seconds spent in each operation since the last reset."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            started = time.perf_counter()
            result = function(*args)
            self.seconds[name] += time.perf_counter() - started
            return result

        return timed


def attach(loaded: LoadedModel) -> Clocks:
    """Put clocks around the kernels and the products of a loaded model."""
    clocks = Clocks()
    kernels: Any = loaded.runner.kernels
    for name in OPERATIONS:
        setattr(kernels, name, clocks.wrap(name, getattr(kernels, name)))
    for layer in loaded.runner.model.layers:
        for part, name in ((layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj")):
            setattr(part, name, clocks.wrap("linear", getattr(part, name)))
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer.mlp, name, clocks.wrap("linear", getattr(layer.mlp, name)))
    head: Callable[[Tensor], Tensor] = loaded.runner.model.lm_head
    loaded.runner.model.lm_head = clocks.wrap("lm_head (in sample)", head)
    return clocks


def decode_steps(
    loaded: LoadedModel, clocks: Clocks, rows: int, context: int, num_steps: int
) -> list[dict[str, float]]:
    """Milliseconds by part and operation of each step in which all rows decode."""
    engine = Engine(EngineConfig(model_path="", speculative="off"), loaded)
    rng = random.Random(0)
    params = SamplingParams(max_tokens=num_steps, temperature=0.0, ignore_eos=True)
    for number in range(rows):
        prompt = [rng.randrange(loaded.config.num_token_ids) for _ in range(context)]
        engine.add(Submit(request_id=str(number), prompt_token_ids=prompt, params=params, arrival=0.0))
    found = []
    while engine.has_work:
        clocks.seconds.clear()
        engine.step()
        record: StepRecord = engine.recorder.steps[-1]
        if record.num_tokens == rows:
            found.append({name: 1000 * value for name, value in (record.seconds | clocks.seconds).items()})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=160)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    loaded = load_model(EngineConfig(model_path=str(resolve_model(args.model).path)))
    clocks = attach(loaded)
    decode_steps(loaded, clocks, 2, 16, 8)
    columns = {rows: decode_steps(loaded, clocks, rows, args.context, args.steps) for rows in args.rows}
    medians = {
        rows: {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        for rows, steps in columns.items()
    }
    print(f"{'ms in a step, medians':<24}" + "".join(f"{rows:>5} rows" for rows in args.rows))
    for name in dict.fromkeys(name for values in medians.values() for name in values):
        print(f"{name:<24}" + "".join(f"{medians[rows].get(name, 0.0):>10.2f}" for rows in args.rows))


if __name__ == "__main__":
    main()
