"""Measure how far each number format is from float32 of the same weights: `python -m tests.bench.quality [MODEL]`.

The text is the first 2,000 tokens of `english.txt`: the opening of chapter 1 of Lewis Carroll's Alice's Adventures in
Wonderland (1865) and chapter 1 of Jane Austen's Pride and Prejudice (1813), both in the public domain. It is cut into
independent pieces of 1,024 tokens, the last one shorter. After each token, the model's distribution of the next token
is compared with that of the reference: the mean of KL(reference || format), in nats, and the share of positions at
which both have the same most likely token. If prompt tokens and generated tokens are computed differently, the text is
evaluated both ways.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from engine.config import EngineConfig
from engine.kernels.cpu.weights import PACKED_TYPES
from engine.loading import LoadedModel, load_model
from engine.scheduling.block_pool import Block
from engine.scheduling.request import BlockTable, Request, Scheduled, Step, new_request
from engine.shared.messages import SamplingParams, Submit
from server.model_paths import ModelError, resolve_model
from server.text.tokenizer import Tokenizer
from tests.bench.requantize import WRITABLE_TYPES, GGMLLibrary, requantize

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


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """The results of one format. They are None if it is not supported here; `failure` is the reason."""

    weights: str
    kv_cache: str
    tokens: str = ""  # whether the text was computed as prompt or as generated tokens, if these differ
    mean_kl: float | None = None
    same_top_token: float | None = None  # share
    failure: str | None = None


class Results(msgspec.Struct, frozen=True, kw_only=True):
    model: str
    kernels: str
    num_tokens: int
    piece_tokens: int
    rows: list[Row]


@dataclass(frozen=True)
class Text:
    """The text in token ids."""

    prefix: list[int]  # put before each piece, and not compared
    pieces: list[list[int]]

    @classmethod
    def read(cls, tokenizer: Tokenizer) -> Self:
        token_ids = tokenizer.encode(TEXT.read_text(), add_special_tokens=False)[:NUM_TOKENS]
        if len(token_ids) < NUM_TOKENS:
            raise ValueError(f"{TEXT.name} has only {len(token_ids)} tokens for this model")
        prefix = [tokenizer.bos_token_id] if tokenizer.add_bos and tokenizer.bos_token_id is not None else []
        return cls(prefix, [token_ids[first : first + PIECE_TOKENS] for first in range(0, NUM_TOKENS, PIECE_TOKENS)])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", default="smollm2-135m", metavar="MODEL", help="default: %(default)s")
    parser.add_argument(
        "--types", nargs="+", default=[], metavar="TYPE", choices=sorted(PACKED_TYPES), help="GGML types"
    )
    parser.add_argument(
        "--ggml-library",
        type=Path,
        metavar="FILE",
        help=f"llama.cpp's libggml-base.so, to write other types than {', '.join(WRITABLE_TYPES)}",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    arguments = parser.parse_args()
    library = None if arguments.ggml_library is None else GGMLLibrary(arguments.ggml_library)
    unwritable = [] if library is not None else sorted(set(arguments.types) - set(WRITABLE_TYPES))
    if unwritable:
        parser.error(f"--types {', '.join(unwritable)}: needs --ggml-library")
    results = measure(arguments.model, arguments.types, library, Console(stderr=True))
    if arguments.json:
        print(msgspec.json.encode(results).decode())
    else:
        print_table(results)
    return 1 if any(row.failure for row in results.rows) else 0


def measure(model: str, types: Sequence[str], library: GGMLLibrary | None, console: Console) -> Results:
    """Measure all formats of the model, and the model in other GGML types, which `library` or `gguf` writes."""
    path = resolve_model(model).path
    text = Text.read(Tokenizer.from_model(path))
    formats = [(weights, kv_cache) for kv_cache in KV_CACHE_DTYPES for weights in FORMATS]
    kernels, rows = compare_formats(path, text, formats, console)
    for type_name in types:
        console.print(f"writing {type_name} ...")
        with tempfile.TemporaryDirectory() as folder:
            written = requantize(path, type_name, Path(folder) / f"{type_name}.gguf", library)
            _, results = compare_formats(written, text, [("float32", "auto"), ("as in the file", "auto")], console)
        rows += [msgspec.structs.replace(row, weights=type_name) for row in results if row.weights != "float32"]
    return Results(model=Path(model).name, kernels=kernels, num_tokens=NUM_TOKENS, piece_tokens=PIECE_TOKENS, rows=rows)


def compare_formats(
    path: Path, text: Text, formats: Sequence[tuple[str, str]], console: Console
) -> tuple[str, list[Row]]:
    """Compare weights and KV caches in other formats with the first. Returns the kernels' name and a row for each.

    One model is in memory at a time; the logits of the reference are in a file.
    """
    rows: list[Row] = []
    kernels = ""
    with tempfile.TemporaryFile() as file:
        for weights, kv_cache in formats:
            console.print(f"{weights}, KV cache {kv_cache} ...")
            blank = Row(weights=weights, kv_cache=kv_cache)
            try:
                loaded = load(path, weights, kv_cache, text)
            except ValueError as error:
                rows.append(msgspec.structs.replace(blank, failure=str(error)))
                continue
            if not rows:
                kernels = loaded.runner.kernels.name
                for logits in all_logits(loaded, text):
                    file.write(logits.numpy().tobytes())
                file.flush()
            reference = np.memmap(file, np.float32, "r").reshape(-1, loaded.config.vocab_size)
            for tokens in ("prompt", "generated") if loaded.runner.kernels.separates_prompts else ("",):
                logits_of_text = all_logits(loaded, text, are_generated=tokens == "generated")
                mean_kl, same_top_token = compare(reference, logits_of_text)
                results = {"tokens": tokens, "mean_kl": mean_kl, "same_top_token": same_top_token}
                rows.append(msgspec.structs.replace(blank, **results))
            del loaded
            gc.collect()
    return kernels, rows


def load(path: Path, weights: str, kv_cache: str, text: Text) -> LoadedModel:
    dtype, quantization = FORMATS[weights]
    config = EngineConfig(
        model_path=str(path),
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=kv_cache,
        max_model_len=len(text.prefix) + PIECE_TOKENS,
    )
    return load_model(config)


def all_logits(loaded: LoadedModel, text: Text, *, are_generated: bool = False) -> Iterator[Tensor]:
    """Yield the float32 logits [.., V] after each token of the pieces, in order; each is valid until the next."""
    for piece in text.pieces:
        token_ids = text.prefix + piece
        submit = Submit(request_id="r", prompt_token_ids=token_ids, params=SamplingParams(max_tokens=1), arrival=0.0)
        request = new_request(submit, salt=b"", arrival_number=0, now=0.0)
        if are_generated:
            request.num_prompt_tokens = 0
        yield from piece_logits(loaded, request, len(text.prefix))


@torch.inference_mode()
def piece_logits(loaded: LoadedModel, request: Request, num_skipped: int) -> Iterator[Tensor]:
    token_ids = request.token_ids
    num_blocks, num_groups = -(-len(token_ids) // loaded.memory.block_size), len(loaded.config.kv_groups)
    for first in range(0, num_groups * num_blocks, num_blocks):
        table = BlockTable()
        table.append([Block(first + index) for index in range(num_blocks)])
        request.kv.tables.append(table)
    runner = loaded.runner
    step_tokens = loaded.limits.max_num_batched_tokens
    for start in range(0, len(token_ids), step_tokens):
        num_tokens = min(step_tokens, len(token_ids) - start)
        item = Scheduled(request, start, num_tokens, num_samples=num_tokens)
        runner.execution.forward(runner.builder.build(Step(1, [item])))
        for rows in torch.split(torch.arange(max(0, num_skipped - start), num_tokens), LOGIT_ROWS):
            yield runner.execution.compute_logits(rows.to(loaded.device)).cpu()


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


def print_table(results: Results) -> None:
    title = f"{results.model}, kernels: {results.kernels}"
    table = Table(
        "weights", "KV cache", "tokens", *(Column(name, justify="right") for name in ("mean KL", "same top token"))
    )
    table.title = title
    for row in results.rows:
        kl = "" if row.mean_kl is None else f"{row.mean_kl:.5f}"
        same = "" if row.same_top_token is None else f"{row.same_top_token:.1%}"
        table.add_row(row.weights, row.kv_cache, row.tokens, kl, same)
    Console().print(table)
    for row in results.rows:
        if row.failure:
            print(f"{row.weights}, KV cache {row.kv_cache}: {row.failure}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ModelError, ValueError) as error:
        sys.exit(f"error: {error}")
