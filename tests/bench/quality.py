"""Measure how far each number format is from float32 of the same weights: `python -m tests.bench.quality [MODEL]`.

The text is the first 2,000 tokens of `english.txt`: the opening of chapter 1 of Lewis Carroll's Alice's Adventures in
Wonderland (1865) and chapter 1 of Jane Austen's Pride and Prejudice (1813), both in the public domain. It is cut into
independent pieces of 1,024 tokens, the last one shorter. After each token, the model's distribution of the next token
is compared with that of the reference: the mean of KL(reference || format), in nats, and the share of positions at
which both have the same most likely token. If prompt tokens and generated tokens are computed differently, the text is
evaluated both ways.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import EngineConfig
from engine.loading import LoadedModel, load_model
from server.model_paths import resolve_model
from server.text.tokenizer import Tokenizer
from tests.bench.serve import parse, print_rows, run
from tests.support import outputs

TEXT = Path(__file__).with_name("english.txt")
NUM_TOKENS = 2000
PIECE_TOKENS = 1024
LOGIT_ROWS = 64  # distributions that are compared at a time

# Name -> (dtype, quantization). The first, with its own KV cache, is the reference.
FORMATS = {
    "float32": ("float32", "none"),
    "bfloat16": ("bfloat16", "none"),
    "int8": ("auto", "int8"),
    "as in the file": ("auto", "auto"),
}
KV_CACHE_DTYPES = ("auto", "int8")


class Text(NamedTuple):
    """The text in token ids."""

    prefix: list[int]  # put before each piece, and not compared
    pieces: list[list[int]]


def read_text(tokenizer: Tokenizer, num_tokens: int) -> Text:
    token_ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False)[:num_tokens]
    if len(token_ids) < num_tokens:
        raise ValueError(f"{TEXT.name} has only {len(token_ids)} tokens for this model")
    prefix = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
    return Text(prefix, [token_ids[first : first + PIECE_TOKENS] for first in range(0, num_tokens, PIECE_TOKENS)])


def main() -> int:
    arguments = parse("quality", __doc__, model="smollm2-135m", tokens=(NUM_TOKENS, "of the text"))
    path = resolve_model(arguments.model).path
    text = read_text(Tokenizer.from_model(path), arguments.tokens)
    rows: list[tuple[str, ...]] = []
    failures: list[str] = []
    with tempfile.TemporaryFile() as file:  # has the logits of the reference: one model is in memory at a time
        for weights, kv_cache in ((weights, kv_cache) for kv_cache in KV_CACHE_DTYPES for weights in FORMATS):
            try:
                loaded = load(path, weights, kv_cache, text)
            except ValueError as error:
                failures.append(f"{weights}, KV cache {kv_cache}: {error}")
                continue
            if not rows:
                print(f"kernels: {loaded.runner.kernels.name}")
                for logits in all_logits(loaded, text):
                    file.write(logits.numpy().tobytes())
                file.flush()
            reference = np.memmap(file, np.float32, "r").reshape(-1, loaded.config.vocab_size)
            for tokens in ("prompt", "generated") if loaded.runner.kernels.separates_prompts else ("",):
                mean_kl, same_top_token = compare(
                    reference, all_logits(loaded, text, is_generated=tokens == "generated")
                )
                rows.append((weights, kv_cache, tokens, f"{mean_kl:.5f}", f"{same_top_token:.1%}"))
            del loaded
            gc.collect()
    print_rows(("weights", "KV cache", "tokens", "mean KL", "same top token"), rows)
    for failure in failures:
        print(failure)
    return 1 if failures else 0


def load(path: Path, weights: str, kv_cache: str, text: Text) -> LoadedModel:
    dtype, quantization = FORMATS[weights]
    kinds = {"dtype": dtype, "quantization": quantization, "kv_cache_dtype": kv_cache}
    config = EngineConfig(model_path=str(path), max_model_len=len(text.prefix) + PIECE_TOKENS, **kinds)
    return load_model(config)


def all_logits(loaded: LoadedModel, text: Text, *, is_generated: bool = False) -> Iterator[Tensor]:
    """Yield the float32 logits [.., V] after each token of the pieces, in order."""
    for piece in text.pieces:
        logits = outputs.all_logits(loaded, text.prefix + piece, is_generated=is_generated)
        yield from logits[len(text.prefix) :].cpu().split(LOGIT_ROWS)


def compare(reference: NDArray[np.float32], logits: Iterator[Tensor]) -> tuple[float, float]:
    """Return the mean KL divergence, and the share of rows with the same top token."""
    kl, num_same, first = 0.0, 0, 0
    for some in logits:
        reference_rows = torch.from_numpy(reference[first : first + len(some)].copy())
        first += len(some)
        expected, found = reference_rows.double().log_softmax(1), some.double().log_softmax(1)
        kl += float((expected.exp() * (expected - found)).sum())
        num_same += int((reference_rows.argmax(1) == some.argmax(1)).sum())
    assert first == len(reference)
    return kl / first, num_same / first


if __name__ == "__main__":
    run(main)
