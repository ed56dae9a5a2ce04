"""All C++ operations under sanitizers, on buffers of exactly the size that they may touch.

The buffers come from numpy, each from an allocation of its own, so that the sanitizer sees an access one byte too far.
It would not in the large mappings that the server uses.
"""

import pytest

from tests.support.kernel_choice import code_paths
from tests.support.sanitizer import run_sanitized, sanitized_library

pytestmark = pytest.mark.skipif(not code_paths(), reason="no kernels in C++ for this processor")

SETUP = """
from pathlib import Path
import numpy as np
from engine.kernels.cpu import c_structs as cpp
from engine.kernels.cpu.library import Library
from engine.kernels.cpu.program import Program
from engine.kernels.cpu.weights import FORMATS, format_of, input_row_bytes

rng = np.random.default_rng(5)  # the seed
library = Library(Path(library_path), {code_path!r})
team = library.new_team({num_threads})
kept = []


def address(array):
    kept.append(array)
    return array.ctypes.data


def floats(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def ints(*numbers):
    return np.array(numbers, dtype=np.int64)


def run(name, parameters):
    program = Program(library, team)
    program.add(name, parameters)
    program.run()
"""

LINEAR = """
BLOCKS = {"int8": (32, 128), "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34),
          "q2_k": (256, 84), "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210),
          "iq4_nl": (32, 18), "iq4_xs": (256, 136), "mxfp4": (32, 17), "uint4": (32, 19), "uint8": (32, 35),
          "float32": (1, 4), "bfloat16": (1, 2)}
for name in FORMATS:
    form = format_of(name, library.code_path)
    block, block_bytes = BLOCKS[name]
    small_shapes = [(33, 64), (17, 96), (40, 320), (1, 32)]
    for num_outputs, num_inputs in [(33, 256), (70, 512), (1, 256)] if block == 256 else small_shapes:
        if block == 1:
            num_inputs -= 1
        data = rng.integers(0, 256, (num_outputs, num_inputs // block * block_bytes), dtype=np.uint8)
        if name in ("int8", "float32"):
            data = floats(num_outputs, num_inputs)
        num_panels, num_blocks = -(-num_outputs // 32), -(-num_inputs // form.block)
        # The panels of a model are contiguous and padded, so whole panels are read.
        weights = np.zeros(num_panels * num_blocks * form.block_bytes, dtype=np.uint8)
        row_bytes = data.nbytes // num_outputs
        run("pack_" + name, cpp.PackParameters(address(data), row_bytes, num_inputs, num_outputs, address(weights)))
        token_ids = ints(num_outputs - 1, 0, num_outputs, -1)
        run("embed_" + name, cpp.EmbedParameters(address(ints(4, 4)), address(token_ids), address(weights), num_outputs,
                                                 num_inputs, address(floats(4, num_inputs)), num_inputs))
        for num_rows, num_generated in [(0, 0), (1, 1), (5, 5), (13, 13), (1, 0), (5, 3), (13, 0), (45, 2)]:
            x = floats(max(num_rows, 1), num_inputs)
            x[0, [0, 16]] = np.nan
            x[-1, -1] = 1e-42
            size = max(input_row_bytes(some, num_inputs) for some in (form.form, form.prompt_form))
            rows = np.zeros((max(num_rows, 1), size), dtype=np.uint8)
            count = address(ints(num_rows, num_generated))
            prepared = cpp.PreparedRows(form.form, form.prompt_form, address(rows), size)
            run("prepare", cpp.PrepareParameters(count, address(x), num_inputs, num_inputs, prepared))
            for bias in (None, address(floats(num_outputs))):
                out = floats(max(num_rows, 1), num_outputs)
                linear = cpp.LinearParameters(count, address(rows), size, address(weights), num_inputs, num_outputs,
                                              bias, address(out), num_outputs, bias is None)
                run("linear_" + name, linear)
"""

ROWS = """
for size in (1, 31, 64, 577, 1055):
    for num_rows in (0, 1, 3, 9):
        count, n = address(ints(num_rows, num_rows // 2)), max(num_rows, 1)
        for form, prompt_form in [(0, 0), (1, 1), (2, 2), (2, 1)]:
            row_bytes = max(input_row_bytes(some, size) for some in (form, prompt_form))
            rows = address(np.zeros((n, row_bytes), dtype=np.uint8))
            prepared = cpp.PreparedRows(form, prompt_form, rows, row_bytes)
            x, y = address(floats(n, size)), address(floats(n, size))
            weight = address(floats(size))
            out = address(floats(n, size)) if form < 2 else None
            for norm in ("rms_norm", "layer_norm"):
                run(norm, cpp.NormParameters(count, x, size, size, weight, 1e-5, out, size, 0, prepared))
                run(norm, cpp.NormParameters(count, x, size, size, weight, 1e-5, y, size, 1))
            for activation in (0, 1, 2, 3):
                act = cpp.ActAndMulParameters(count, x, size, y, size, size, activation, out, size, prepared)
                run("act_and_mul", act)
        for values in (floats(n, size), floats(n, size) * 1e4):
            run("add", cpp.AddParameters(count, x, size, size, 0.5, address(values), size))
            for softcap in (0.0, 30.0):
                run("scale", cpp.ScaleParameters(count, address(values), size, size, 0.5, softcap))
        table = address(floats(4, size))
        index = address(rng.integers(0, 4, n))
        run("gather", cpp.GatherParameters(count, index, table, size, size, address(floats(n, size)), size))
"""

ATTENTION = """
CACHE_TYPES = [(0, np.float32), (1, np.uint16), (2, np.int8)]
MAX_PARTIALS = 20
for cache_type, dtype in CACHE_TYPES:
    for num_kv_heads, group, size, block_size in [(1, 3, 16, 16), (2, 1, 48, 32), (1, 8, 64, 256)]:
        num_heads, num_blocks, window = num_kv_heads * group, 600 // block_size + 4, 100 if group == 3 else 0
        keys, values = (np.zeros((num_blocks, num_kv_heads, block_size, size), dtype=dtype) for _ in range(2))
        scales = [address(np.zeros((num_blocks, num_kv_heads, block_size), dtype=np.float32)) for _ in range(2)]
        cache = cpp.CacheParameters(cache_type, address(keys), address(values),
                                    *(scales if cache_type == 2 else (None, None)), block_size, num_kv_heads, size,
                                    num_kv_heads * block_size * size, num_kv_heads * block_size)
        tile = max(1, 48 // group) * group
        for query_lens, seq_lens in [([7, 1], [7, 1]), ([29, 1], [300, 600]), ([1], [513])]:
            num_rows, width = sum(query_lens), (num_heads + 2 * num_kv_heads) * size
            tables = np.zeros((len(seq_lens), max(-(-length // block_size) for length in seq_lens)), dtype=np.int64)
            ids = iter(rng.permutation(num_blocks))
            for row, length in enumerate(seq_lens):
                used = -(-length // block_size)
                tables[row, :used] = [next(ids) for _ in range(used)] if used < num_blocks // 2 else range(used)
            positions = [(s, p) for s, (q, n) in enumerate(zip(query_lens, seq_lens)) for p in range(n - q, n)]
            slot_mapping = ints(*(tables[s, p // block_size] * block_size + p % block_size for s, p in positions))
            heads = floats(num_rows, width)
            heads[0, 0] = np.nan
            start = address(heads)
            k, v = start + 4 * num_heads * size, start + 4 * (num_heads + num_kv_heads) * size
            rotations = [address(floats(num_rows, size)) for _ in range(2)]
            count = address(ints(num_rows, 1))
            slot_mapping[-1] = -1
            all_of_q, of_one = ((address(floats(n * size)), n * size) for n in (num_heads, 1))
            for q_norm, norm in [((None, 0), (None, 0)), (of_one, of_one), (all_of_q, of_one)]:
                rows = [cpp.Heads(start, width, *q_norm), cpp.Heads(k, width, *norm), cpp.Heads(v, width, *norm)]
                for heads_of_row in (rows, [rows[0], cpp.Heads(), cpp.Heads()]):
                    run("rope_and_store_kv", cpp.RopeAndStoreKvParameters(
                        count, address(slot_mapping), num_heads, *heads_of_row, *rotations, 1e-5, cache))
            partials = np.zeros((MAX_PARTIALS, num_kv_heads, tile, size + 2), dtype=np.float32)
            scratch = np.zeros((team.num_threads, tile * (2 * size + 2)), dtype=np.float32)
            items = np.zeros((num_rows + MAX_PARTIALS, ctypes.sizeof(cpp.AttentionItem)), dtype=np.uint8)
            merges = np.zeros((MAX_PARTIALS, ctypes.sizeof(cpp.AttentionMerge)), dtype=np.uint8)
            plan = cpp.AttentionPlan(0, 0, address(items), address(merges), MAX_PARTIALS, address(partials),
                                     address(scratch), scratch.shape[1])
            lens = [address(ints(*lengths)) for lengths in (query_lens, seq_lens)]
            run("plan_attention", cpp.PlanAttentionParameters(address(ints(len(seq_lens))), *lens, num_heads,
                                                              num_kv_heads, window, ctypes.addressof(plan)))
            assert plan.num_items <= num_rows + MAX_PARTIALS
            for softcap, form in [(0.0, 0), (30.0, 1), (0.0, 2)]:
                out, row_bytes = floats(num_rows, num_heads * size), input_row_bytes(form, num_heads * size)
                is_prepared = form > 0 and size % 32 == 0
                prepared = address(np.zeros((num_rows, row_bytes), dtype=np.uint8)) if is_prepared else None
                rows = cpp.PreparedRows(form, form, prepared, row_bytes)
                sinks = address(floats(num_heads)) if form == 1 else None
                attention = cpp.PagedAttentionParameters(count, start, width, num_heads, size**-0.5, window, softcap,
                                                         sinks, address(tables), tables.shape[1],
                                                         ctypes.addressof(plan), cache,
                                                         None if is_prepared else address(out), num_heads * size, rows)
                run("paged_attention", attention)
"""


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("code_path", code_paths())
def test_no_operation_leaves_its_buffers(code_path: str, num_threads: int) -> None:
    setup = SETUP.format(code_path=code_path, num_threads=num_threads)
    result = run_sanitized(setup + LINEAR + ROWS + ATTENTION + "print('all done')\n", sanitized_library(code_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("all done\n")
