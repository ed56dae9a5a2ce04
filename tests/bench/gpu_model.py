"""Estimate the time of a step on a card: `make bench-gpu-model`, or `python -m tests.bench.gpu_model`.

The engine's own code runs on torch's meta device, and the launches that it makes are recorded. `gpu_costs.py` computes
from their shapes how long each takes on a card. The table says what bounds each kind of launch, and what share of the
limit is to be expected: of a copy's bandwidth for decoding, of a large product's rate for a prompt. Figures of a card
come from `make bench-gpu`, which shows these estimates beside them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.loading import KV_CACHE_DTYPES
from tests.bench.gpu_costs import COPY_SHARE, PRODUCT_SHARE, cost_of, eager_seconds, time_of
from tests.bench.serve import parse
from tests.support.gpu_cards import CARDS, Card
from tests.support.gpu_shapes import SHAPES, TARGET_MODEL, TARGETS, Shape, decode_name, prefill_name
from tests.support.meta_models import MetaModel, Sequence, TracedStep, load_meta_model, model_config, traced_step

MEMORY_SHARE = 0.95  # that the engine may use
NUM_KINDS = 3  # kinds of launches that the table shows for a step

# Steps by name, as `make bench-gpu` measures them.
STEPS: Mapping[str, list[Sequence]] = {
    decode_name(1): [Sequence(1056)],
    decode_name(8): [Sequence(1056)] * 8,
    decode_name(64): [Sequence(1056)] * 64,
    "decode, 32 streams of 8k": [Sequence(8192)] * 32,
    "decode, 63 streams and one of 32k": [Sequence(1056)] * 63 + [Sequence(32768)],
    prefill_name(8192): [Sequence(0, 8192)],
    "prefill of 2048 beside 64 streams": [Sequence(1056)] * 64 + [Sequence(0, 2048)],
}


class Kind(msgspec.Struct, frozen=True):
    """All launches of a kernel in a step that have the same bound."""

    name: str
    num_launches: int
    seconds: float
    bound: str


class StepEstimate(msgspec.Struct, frozen=True):
    name: str
    num_launches: int
    peak_bytes: int  # of the activations
    graph_seconds: float
    eager_seconds: float
    floor: float  # seconds
    kinds: list[Kind]  # the longest first

    @property
    def share(self) -> float:
        """The expected share of the limit. Steps that contain prompts do not run as graphs."""
        return self.floor / (self.graph_seconds if self.name.startswith("decode") else self.eager_seconds)


class Estimate(msgspec.Struct, frozen=True):
    card: str
    model: str
    steps: list[StepEstimate]
    num_tokens: int  # that the KV cache holds
    too_large: list[str]  # steps of more tokens


def main() -> None:
    given = parse(
        "gpu_model",
        __doc__,
        card=(list(CARDS), "to estimate for", *CARDS),
        shape=("llama-3-8b", "of the model", *SHAPES),
        packed=("", "GGML type of the weights, as Q4_K, instead of bfloat16"),
        kv_cache_dtype=("auto", "as for lightwell serve", *KV_CACHE_DTYPES),
    )
    settings = {"packed": given.packed or None, "kv_cache_dtype": given.kv_cache_dtype}
    estimates = [estimate(given.shape, CARDS[name], **settings) for name in given.card]
    for found in estimates:
        print(f"{found.model} on {found.card}, a model and not a measurement:\n\n{markdown(found)}\n")
        if found.too_large:
            print(f"Its KV cache holds {found.num_tokens} tokens, too few for: {'; '.join(found.too_large)}.\n")


def estimate(shape: str, card: Card, steps: Mapping[str, list[Sequence]] = STEPS, **settings: Any) -> Estimate:
    """Return the estimates of all steps for a model on a card."""
    longest = max(sequence.num_computed + sequence.num_rows for sequences in steps.values() for sequence in sequences)
    settings = {"gpu_memory_utilization": MEMORY_SHARE, "max_model_len": longest} | settings
    model = load_meta_model(model_config(SHAPES[shape]), card, **settings)
    num_tokens = model.memory.num_tokens
    fitting = {name: some for name, some in steps.items() if num_tokens_of(some) <= num_tokens}
    traces = {name: traced_step(model, sequences) for name, sequences in fitting.items()}
    found = [step_estimate(name, model, step, SHAPES[shape]) for name, step in traces.items()]
    model_name = f"{shape}, {settings['packed']}" if settings.get("packed") else shape
    return Estimate(card.name, model_name, found, num_tokens, [name for name in steps if name not in fitting])


def num_tokens_of(sequences: list[Sequence]) -> int:
    return sum(sequence.num_computed + sequence.num_rows for sequence in sequences)


def step_estimate(name: str, model: MetaModel, step: TracedStep, shape: Shape) -> StepEstimate:
    """Return the time of each kind of launch of a step, and of the step."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    numbers: Counter[tuple[str, str]] = Counter()
    for launch in step.launches:
        time = time_of(cost_of(launch, step, model.card), model.card)
        seconds[launch.name, time.bound] += time.seconds
        numbers[launch.name, time.bound] += 1
    in_graph = sum(seconds.values())
    kinds = [Kind(kernel, numbers[kernel, bound], time, bound) for (kernel, bound), time in seconds.items()]
    kinds.sort(key=lambda kind: -kind.seconds)
    return StepEstimate(
        name,
        len(step.launches),
        step.peak_bytes,
        in_graph,
        max(in_graph, eager_seconds(step.launches)),
        floor_of(step, model, shape),
        kinds,
    )


def floor_of(step: TracedStep, model: MetaModel, shape: Shape) -> float:
    """Return the limit of a step: the copy of what it must read, or the product of what it must compute."""
    prompts = [sequence for sequence in step.sequences if sequence.num_rows > 1]
    decoding = [sequence for sequence in step.sequences if sequence.num_rows == 1]
    token_bytes = model.memory.block_bytes // model.memory.block_size
    kv_bytes = sum(sequence.num_computed + 1 for sequence in decoding) * token_bytes
    read = (weight_bytes_read(model, shape) + kv_bytes) / (COPY_SHARE * model.card.bytes_per_second)
    operations = sum(shape.prefill_operations(sequence.num_rows) for sequence in prompts)
    return max(read, operations / (PRODUCT_SHARE * model.card.bf16_per_second))


def weight_bytes_read(model: MetaModel, shape: Shape) -> float:
    """Return the bytes of the weights that a step reads: all but the embeddings."""
    num_weights = shape.num_weights_read + shape.vocab_size * shape.hidden_size
    return model.weight_bytes * shape.num_weights_read / num_weights


def markdown(found: Estimate) -> str:
    """Return a table of the steps, with the kinds of launches that take the longest."""
    columns = ("step", "launches", "peak MiB", "graph ms", "eager ms", "limit ms", "expected", "target", "longest")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for step in found.steps:
        target = TARGETS.get(step.name) if (found.model, found.card) == TARGET_MODEL else None
        times = (f"{1000 * seconds:.2f}" for seconds in (step.graph_seconds, step.eager_seconds, step.floor))
        longest = step.kinds[:NUM_KINDS]
        kinds = (f"{kind.name} {kind.seconds / step.graph_seconds:.0%} ({kind.bound})" for kind in longest)
        numbers = (str(step.num_launches), f"{step.peak_bytes / 2**20:.0f}", *times, f"{step.share:.0%}")
        lines.append(f"| {' | '.join((step.name, *numbers, f'{target:.0%}' if target else '', ', '.join(kinds)))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
