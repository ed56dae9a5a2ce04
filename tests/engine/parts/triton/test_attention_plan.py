"""The work list of attention: each key of each row is computed once, and all programs walk about as long."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.batch.inputs import Lengths, WorkList
from engine.config import AttentionKind
from engine.parts.triton.attention_plan import (
    END_SEGMENT,
    FIRST_SEGMENT,
    MAX_PARTIAL_BYTES,
    TritonAttentionPlanner,
    new_planner,
)
from engine.parts.triton.tiles import TABLE
from tests.support.examples import num_examples

SEED = 5
H100, L4 = 132, 58  # multiprocessors

Draw = Callable[[np.random.Generator], tuple[list[int], list[int]]]  # query lengths, sequence lengths


def planner_of(
    num_kv_heads: int = 8, group_size: int = 4, head_dim: int = 128, window: int | None = None, processors: int = H100
) -> TritonAttentionPlanner:
    sizes = TABLE[9, 0].attention
    num_programs = processors * sizes.programs
    kind = AttentionKind(num_kv_heads * group_size, num_kv_heads, head_dim, window)
    return new_planner(sizes, kind, num_programs)


def loads(planner: TritonAttentionPlanner, work: WorkList) -> NDArray[np.int64]:
    """Return the number of segments that each program walks."""
    sizes = work.table[:, END_SEGMENT] - work.table[:, FIRST_SEGMENT]
    return np.array([sizes[first:end].sum() for first, end in work.table[: planner.num_programs, :2]])


def check(planner: TritonAttentionPlanner, work: WorkList, query_lens: Lengths, seq_lens: Lengths) -> None:
    """Assert that each row sees each of its keys once, and that partial results are merged once, in order."""
    programs, items = work.table[: planner.num_programs], work.table[planner.num_programs :]
    walked = [row for first, end in programs[:, :2] for row in range(first, end)]
    assert walked == list(range(planner.num_programs, len(work.table)))
    segments: dict[tuple[int, ...], list[int]] = {}  # of each tile
    partials: dict[tuple[int, ...], list[int]] = {}  # first row of each partial result of a tile
    for *tile, first, end, partial_row in items.tolist():
        done = segments.setdefault(tuple(tile), [])
        assert first < end
        assert not done or end == first + 1
        done += range(first, end)
        if partial_row >= 0:
            partials.setdefault(tuple(tile), []).append(partial_row)
    rows = []
    for (sequence, first_row, num_rows, position), done in segments.items():
        oldest = position - planner.window + 1 if planner.window is not None else 0
        first, end = max(0, oldest) // planner.segment, (position + num_rows - 1) // planner.segment
        assert done == list(range(first, end + 1))
        rows += [(sequence, first_row + n, position + n) for n in range(num_rows)]
    starts = query_lens.cumsum() - query_lens
    assert sorted(rows) == [
        (sequence, starts[sequence] + n, seq_lens[sequence] - query_lens[sequence] + n)
        for sequence in range(len(query_lens))
        for n in range(query_lens[sequence])
    ]
    merged = [row.tolist() for row in programs[:, 2:6] if row[2]]
    assert merged == [[tile[1], tile[2], len(its), its[0]] for tile, its in partials.items()]
    used = [row + n for tile, its in partials.items() for row in its for n in range(tile[2] * planner.part_size)]
    assert used == list(range(work.num_partial_rows))


def heavy_tail(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    num_seqs = int(rng.integers(1, 257))
    return [1] * num_seqs, np.minimum(rng.pareto(1.0, num_seqs) * 200 + 1, 131072).astype(int).tolist()


def chunks_beside_decoding(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    query_lens = [1] * int(rng.integers(0, 64)) + rng.integers(0, 1024, int(rng.integers(1, 4))).tolist()
    return query_lens, [n + int(rng.integers(not n, 8192)) for n in query_lens]


DRAWS: list[Draw] = [heavy_tail, chunks_beside_decoding]
DRAWS.append(lambda rng: ([1] * 64, [32768, *rng.integers(1, 1024, 63)]))  # short beside one of 32k
DRAWS.append(lambda rng: ([1] * (num := int(rng.integers(1, 257))), [int(rng.integers(1, 32768))] * num))
DRAWS.append(lambda rng: (lens := rng.integers(1, 4096, int(rng.integers(1, 4))).tolist(), lens))  # prompts


@pytest.mark.drawn
@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("draw", DRAWS)
def test_programs_walk_about_as_long(draw: Draw, window: int | None) -> None:
    """Borders lie within half a small tile of equal shares, if there is room for the partial results."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for _ in range(num_examples(4, 100)):
        num_kv_heads, group_size = [(8, 4), (8, 8), (1, 8), (4, 7), (32, 1), (2, 3)][rng.integers(6)]
        planner = planner_of(num_kv_heads, group_size, window=window, processors=[H100, L4][rng.integers(2)])
        query_lens, seq_lens = map(np.array, draw(rng))
        work = planner.plan(query_lens, seq_lens)
        check(planner, work, query_lens, seq_lens)
        found = loads(planner, work)
        ideal = found.sum() / planner.num_programs
        assert work.num_partial_rows * num_kv_heads * 128 * 4 <= MAX_PARTIAL_BYTES
        if work.num_partial_rows < planner.max_partial_rows / 2:
            assert found.max() <= 9 / 8 * ideal + 1, (query_lens, seq_lens)
            assert found.min() >= 7 / 8 * ideal - 1, (query_lens, seq_lens)
            assert found.min() > 0 or ideal < 1, (query_lens, seq_lens)


@pytest.mark.parametrize(("seq_len", "bound"), [(32768, 1.01), (131072, 1.25)])
def test_partial_results_have_a_bounded_buffer(seq_len: int, bound: float) -> None:
    """64 sequences as long as the longest: if all were split at each segment, they would need 256 MiB and 1 GiB."""
    planner = planner_of(8, 8)
    ones = np.ones(64, dtype=np.int64)
    work = planner.plan(ones, ones * seq_len)
    check(planner, work, ones, ones * seq_len)
    assert 0 < work.num_partial_rows <= planner.max_partial_rows == MAX_PARTIAL_BYTES // (8 * 128 * 4)
    found = loads(planner, work)
    assert found.max() <= bound * found.sum() / planner.num_programs
    assert found.min() > 0


def test_the_largest_work_list() -> None:
    """Work lists of steps of a size fit into the buffers of its CUDA graph."""
    print(f"seed {SEED}")
    rng = np.random.default_rng(SEED)
    for num_seqs in (1, 2, 8, 64):
        for planner in (planner_of(), planner_of(1, 1, window=700), planner_of(8, 8, processors=L4)):
            largest = planner.largest(num_seqs, 8192)
            for seq_lens in (np.full(num_seqs, 8192), rng.integers(1, 8193, num_seqs)):
                work = planner.plan(np.ones(num_seqs, dtype=np.int64), seq_lens)
                assert len(work.table) <= len(largest.table)
                assert work.num_partial_rows <= largest.num_partial_rows
            assert not largest.table.any()


@pytest.mark.parametrize("query_lens", [[], [0], [0, 0, 0]], ids=str)
def test_no_rows(query_lens: list[int]) -> None:
    planner = planner_of()
    lens = np.array(query_lens, dtype=np.int64)
    work = planner.plan(lens, lens + 5)
    assert len(work.table) == planner.num_programs
    assert work.num_partial_rows == 0
    assert not loads(planner, work).any()
