"""What a replica is: the time of its steps and the limits of its engine. `profiles.json` has what was measured."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tests.bench.capacity.step_time import StepTime

PATH = Path(__file__).with_name("profiles.json")
HOST_SECONDS = 0.5e-3  # of a step on a GPU that no data sheet tells: launches of what is not in a graph, the scheduler
GPU_MODEL = "llama-3-8b"
GPU_MEMORY_SHARE = 0.9  # default of --gpu-memory-utilization
GPU_RESERVE = 3 << 30  # activations and CUDA graphs


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One replica."""

    name: str
    is_measured: bool
    processor: str
    model: str
    step_time: StepTime
    block_size: int
    num_blocks: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_step_ms: float | None = None  # bound on a step beside a stream
    shares_answers: bool  # whether a prompt finds the blocks of an answer that it contains
    max_ttft: float  # target: seconds to the first token
    max_itl: float  # target: mean seconds between tokens of an answer


def load_profiles() -> dict[str, Profile]:
    """Return the profiles by name: the measured ones, and a GPU as its data sheet says."""
    measured = msgspec.json.decode(PATH.read_bytes(), type=list[Profile]) if PATH.exists() else []
    return {profile.name: profile for profile in (*measured, roofline("h100"))}


def roofline(card_name: str) -> Profile:
    """Return a profile of the rates on a card's data sheet, and of the shares of them that large operations reach.

    Nothing of it is measured. Weights and KV cache are in bfloat16.
    """
    from tests.bench.gpu_costs import COPY_SHARE, PRODUCT_SHARE
    from tests.support.gpu_cards import CARDS
    from tests.support.gpu_shapes import SHAPES

    card, shape = CARDS[card_name], SHAPES[GPU_MODEL]
    bytes_per_second, products_per_second = COPY_SHARE * card.bytes_per_second, PRODUCT_SHARE * card.bf16_per_second
    head = shape.vocab_size * shape.hidden_size
    token = 2 * (shape.num_weights_read - head) / products_per_second
    key_bytes = shape.num_layers * shape.attention_bytes(1, 1)
    # A prompt's keys are read once for many rows, so the products count: with the query, and with the values.
    key_products = 4 * shape.num_layers * shape.num_heads * shape.head_dim
    free = GPU_MEMORY_SHARE * card.memory_bytes - 2 * (shape.num_weights_read + head) - GPU_RESERVE
    block_size = 32
    return Profile(
        name=card_name,
        is_measured=False,
        processor=f"{card.name}, from its data sheet",
        model=f"{GPU_MODEL}, bfloat16",
        step_time=StepTime(
            fixed=HOST_SECONDS,
            weights=2 * shape.num_weights_read / bytes_per_second,
            prompt_tokens=token,
            decode_tokens=token,
            samples=2 * head / products_per_second,
            prompt_keys=key_products / products_per_second,
            decode_keys=key_bytes / bytes_per_second,
        ),
        block_size=block_size,
        num_blocks=int(free / (key_bytes * block_size)),
        max_num_seqs=128,
        max_num_batched_tokens=8192,
        max_model_len=16384,
        max_step_ms=100.0,
        shares_answers=True,
        max_ttft=1.0,
        max_itl=0.05,
    )
