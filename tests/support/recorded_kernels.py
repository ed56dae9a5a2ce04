"""Small programs of the C++ kernels, which run on rows of a test's tables."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.batch.builder import BatchBuilder
from engine.kernels.cpu.kernels import CpuKernels
from engine.kernels.cpu.program import Program
from engine.kernels.interface import KernelOptions, LayerCache, LinearOp
from engine.scheduling.block_pool import Block
from engine.scheduling.request import Scheduled, Step, new_request
from engine.shared.messages import SamplingParams, Submit
from tests.support.kernel_choice import load_library
from tests.support.tensors import CPU

MAX_ROWS = 130
SEED = 3


def make_kernels(code_path: str, num_threads: int = 1, options: KernelOptions | None = None) -> CpuKernels:
    """Return kernels in float32, unless `options` say otherwise."""
    return CpuKernels(load_library(code_path), options or KernelOptions(torch.float32), num_threads)


class Rows:
    """A recorded operation: call it with row numbers and it computes those rows of `tables`."""

    def __init__(
        self,
        kernels: CpuKernels,
        tables: Sequence[Tensor],
        operation: Callable[..., Tensor],
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.program = Program(kernels.library, kernels.team)
        self.rows = torch.zeros(max_rows, dtype=torch.int64)
        self.num_rows = np.zeros(2, dtype=np.int64)
        with kernels.recording(self.program, {self.rows.data_ptr(): self.num_rows.ctypes.data}):
            self.out = operation(self.rows, *(kernels.gather(table, self.rows) for table in tables))

    def __call__(self, rows: Sequence[int], num_prompt_rows: int = 0) -> Tensor:
        """Run on rows, of which the last `num_prompt_rows` are those of prompts and the others of generated tokens."""
        self.rows[: len(rows)] = torch.tensor(rows)
        self.num_rows[:] = len(rows), len(rows) - num_prompt_rows
        self.out.fill_(7.0)  # must stay after the last row
        self.program.run()
        assert (self.out[len(rows) :] == 7.0).all()
        return self.out[: len(rows)].clone()


def assert_rows_are_independent(rows: Rows, num_rows: int = MAX_ROWS) -> Tensor:
    """Check that a row has the same bits alone, at any index and among any rows. Returns the result of all rows."""
    everything = assert_rows_of_a_kind_are_independent(rows, num_rows, are_prompts=False)
    prompts = assert_rows_of_a_kind_are_independent(rows, num_rows, are_prompts=True)
    for num_prompt_rows in (1, 40, num_rows - 1):
        mixed = rows(range(num_rows), num_prompt_rows)
        first = num_rows - num_prompt_rows
        assert torch.equal(mixed, torch.cat([everything[:first], prompts[first:]])), f"{num_prompt_rows} of prompts"
    return everything


def assert_rows_of_a_kind_are_independent(rows: Rows, num_rows: int, *, are_prompts: bool) -> Tensor:
    everything = rows(range(num_rows), are_prompts * num_rows)
    alone = torch.cat([rows([row], are_prompts) for row in range(num_rows)])
    assert torch.equal(alone, everything)
    for num in range(2, 41):
        some = list(range(num_rows - num, num_rows))[:: 1 if num % 2 else -1]
        assert torch.equal(rows(some, are_prompts * num), everything[some]), f"{num} rows"
    return everything


def assert_close(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Check that each number is within its bound."""
    worst = ((actual.double() - expected).abs() / bound).nan_to_num(nan=torch.inf).max()
    assert worst <= 1, f"an error is {worst} times its bound"


class Sequences:
    """A recorded program of rotary embedding, KV cache and attention.

    Row i of `table` holds q, k and v of token i, sequence after sequence. A step computes rows (sequence, start, end).
    Blocks are scattered, and NaN where no token is stored.
    """

    def __init__(
        self,
        kernels: CpuKernels,
        heads: tuple[int, int, int],  # query heads, KV heads, head size
        table: Tensor,  # [tokens, (query heads + 2 * KV heads) * head size]
        seq_lens: Sequence[int],
        *,
        block_size: int = 16,
        window: int | None = None,
        project: LinearOp | None = None,
        seed: int = SEED,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = heads
        self.block_size, self.window, self.seq_lens = block_size, window, seq_lens
        self.first_tokens = [sum(seq_lens[:index]) for index in range(len(seq_lens))]
        angles = torch.rand(max(seq_lens), self.head_dim // 2, generator=torch.Generator().manual_seed(seed)) * 1000
        self.cos, self.sin = angles.cos(), angles.sin()
        num_blocks = [-(-length // block_size) for length in seq_lens]
        shuffled = np.random.default_rng(seed).permutation(sum(num_blocks) + 3)
        self.block_ids = [ids.tolist() for ids in np.split(shuffled, np.cumsum(num_blocks))[: len(seq_lens)]]
        # The second of three layers, whose blocks alternate.
        _, self.cache, _ = kernels.new_kv_cache(3, len(shuffled), block_size, self.num_kv_heads, self.head_dim)
        self.generated: set[int] = set()  # sequences whose tokens count as generated; they come first in a step
        self.forget()
        self.builder = BatchBuilder(2048, 64, max(seq_lens), block_size, CPU)
        self._record(kernels, table, project)

    def _record(self, kernels: CpuKernels, table: Tensor, project: LinearOp | None) -> None:
        self.program = Program(kernels.library, kernels.team)
        batch = self.builder.buffers()
        num_rows = self.builder.num_rows.ctypes.data
        index_rows = {batch.token_ids.data_ptr(): num_rows, batch.positions.data_ptr(): num_rows}
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        with kernels.recording(self.program, index_rows, self.builder.num_seqs.ctypes.data):
            heads = kernels.gather(table, batch.token_ids).view(-1, sum(sizes), self.head_dim)
            q, k, v = torch.split(heads, sizes, dim=1)
            cos, sin = (kernels.gather(angles, batch.positions) for angles in (self.cos, self.sin))
            counts = (self.num_heads, self.num_kv_heads)
            self.plan = kernels.plan_attention(batch, batch.query_lens, *counts, self.cache, self.window)
            self.q = kernels.rope_and_store_kv(q, k, v, cos, sin, batch.slot_mapping, self.cache)
            out = kernels.paged_attention(self.q, self.cache, self.plan, self.head_dim**-0.5)
            self.out = out if project is None else project(out.flatten(1))

    def forget(self) -> None:
        """Fill the cache with the garbage of a failed request."""
        garbage = torch.nan if self.cache.key_scales is None else 127
        for tensor in (self.cache.keys, self.cache.values):
            tensor.fill_(garbage)
        for scales in (self.cache.key_scales, self.cache.value_scales):
            if scales is not None:
                scales.fill_(torch.nan)

    def step(self, *spans: tuple[int, int, int]) -> list[Tensor]:
        """Store and attend. Returns the result of each span [rows, query heads, head size], or its projection."""
        self.builder.build(Step(1, [self._scheduled(*span) for span in spans]))
        self.program.run()
        lengths = [end - start for _, start, end in spans]
        return [out.clone() for out in torch.split(self.out[: sum(lengths)], lengths)]

    def _scheduled(self, sequence: int, start: int, end: int) -> Scheduled:
        first = self.first_tokens[sequence]
        token_ids = list(range(first, first + self.seq_lens[sequence]))
        submit = Submit(request_id="r", prompt_token_ids=token_ids, params=SamplingParams(max_tokens=1), arrival=0.0)
        request = new_request(submit, salt=b"", arrival_number=0, now=0.0)
        if sequence in self.generated:
            request.num_prompt_tokens = 0
        request.kv.set_blocks([Block(block_id) for block_id in self.block_ids[sequence]])
        return Scheduled(request, start, end - start, num_samples=0)


def stored_heads(cache: LayerCache, head: int, block_ids: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return keys and values [tokens, head size] of one KV head, read from the layout of kv_cache.h."""
    blocks = torch.tensor(block_ids)
    keys, values = cache.keys[blocks, head], cache.values[blocks, head]
    if keys.ndim == 4:  # bfloat16 in pairs: keys [B, D / 2, N, 2], values [B, N / 2, D, 2]
        keys, values = keys.transpose(2, 3).flatten(1, 2), values.transpose(2, 3).flatten(1, 2)
    keys, values = keys.transpose(1, 2).flatten(0, 1).float(), values.flatten(0, 1).float()
    if cache.key_scales is not None and cache.value_scales is not None:
        keys = keys * cache.key_scales[blocks, head].flatten()[:, None]
        values = values * cache.value_scales[blocks, head].flatten()[:, None]
    return keys[:num_tokens], values[:num_tokens]
