"""The variants of the Triton kernels that a card runs, as data for `tests/support/compiled_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from engine.parts.triton import attention, experts, linear, rows, sampler
from engine.parts.triton.tiles import SMALLEST, TABLE, LinearTable, LinearTile, Tiles
from tests.support.compiled_kernels import Variant

MODEL_TENSORS = "x weights bias out weight gate up q k v keys values a b q_weight k_weight v_weight"
OTHER_TENSORS = {
    "*fp32": "partial states minima q_rotations k_rotations sinks inner",
    "*fp16": "scales",
    "*i64": "slot_mapping ranks lora_slots work tables",
    "*i32": "tiles pairs ends experts",
    "fp32": "eps scale softcap",
}
OTHER_TYPES = {name: kind for kind, names in OTHER_TENSORS.items() for name in names.split()}
ROUTER_TYPES = {"logits": "*fp32", "bias": "*fp32", "expert_scales": "*fp32", "weights": "*fp32"}
SAMPLER_TYPES = dict.fromkeys(("logits", "highest", "found", "states"), "*fp32")
SAMPLER_TYPES |= dict.fromkeys(("changes", "lists", "draws", "nums_found"), "*i32")
MIXER_TYPES = dict.fromkeys(("rows", "weights", "bias", "decays", "step_bias", "states", "out"), "*fp32")
MIXER_TYPES |= {"moves": "*i64", "key_heads": "*i64"}
SAMPLER_TYPES |= {"token_ids": "*i64", "is_finite": "*u8", "masks": "*u8", "rows": "*i64"}


class WeightFormat(NamedTuple):
    """How a product reads its weights: the kernel's constants, and the type of the codes."""

    format: str
    codes: str
    group_outputs: int = 1
    group: int = 1
    has_minimum: bool = False
    scales: str = "*fp16"


PLAIN = "plain"
PACKED = {
    "int4": WeightFormat("int4", "*u8", 1, 32, has_minimum=True),  # Q4_1, Q4_K
    "int4 of 128": WeightFormat("int4", "*u8", 1, 128, has_minimum=True),  # GPTQ, AWQ
    "int8": WeightFormat("int8", "*i8", 1, 32),
    "int8 of 16": WeightFormat("int8", "*i8", 1, 16),  # Q6_K
    "int8 with minimum": WeightFormat("int8", "*i8", 1, 32, has_minimum=True),  # Q5_K
    "float4": WeightFormat("float4", "*u8", 1, 32, scales="*u8"),  # MXFP4
    "float8": WeightFormat("float8", "*fp8e4nv", 128, 128),
}
HEADS = {64: 64, 80: 128, 128: 128, 256: 256, 512: 512, 576: 1024}  # head sizes and the columns of their tiles
HEADS_WITH_SINKS = frozenset({64})  # as gpt-oss
NO_NORMS: dict[str, Any] = dict.fromkeys(("q_weight", "k_weight", "v_weight"))
SAMPLER, PIECE, ID_PIECE = (SAMPLER_TYPES, sampler.NUM_WARPS), {"PIECE": sampler.PIECE}, {"PIECE": sampler.ID_PIECE}
Types = dict[str, str]


def tiles_of(target: str, dtype: str) -> Tiles:
    """Return the tiles for a target ("cuda 9.0") and a dtype ("*bf16")."""
    kind, version = target.split()
    if kind != "cuda" or dtype == "*fp32":
        return SMALLEST
    major, minor = map(int, version.split("."))
    return TABLE[max(key for key in TABLE if key <= (major, minor))]


def variants_of(target: str, dtype: str) -> list[Variant]:
    """Return the variants of all kernels."""
    tiles, types = tiles_of(target, dtype), dict.fromkeys(MODEL_TENSORS.split(), dtype) | OTHER_TYPES
    float8 = "*fp8e4nv" if target in ("cuda 8.9", "cuda 9.0", "cuda 10.0", "cuda 12.0") else "*u8"  # or its bits
    caches = {"": {}, " int8": cache_types("*i8"), " float8": cache_types(float8)}
    packed = PACKED | {"float8": PACKED["float8"]._replace(codes=float8)}
    return [
        *plain_products(tiles.linear, types),
        *(
            product(f"linear {name} {size_of(tile)}", tiles.packed_linear, tile, types, weights)
            for name, weights in packed.items()
            for tile in tiles.packed_linear.tiles
        ),
        *attention_kernels(tiles, types, caches),
        *expert_kernels(tiles, types),
        *row_kernels(types, caches),
        *mixer_kernels(dtype),
        *(Variant(f"top {flag}", "sampler._top", {"IS_CHANGED": flag, **PIECE}, *SAMPLER) for flag in (False, True)),
        *(Variant(name, f"sampler._{name}", PIECE, *SAMPLER) for name in ("forbid", "collect", "draw")),
        *(Variant(name, f"sampler._{name}", ID_PIECE, *SAMPLER) for name in ("add_biases", "penalise")),
        Variant("shrink", "lora._shrink", {}, types, num_warps=2, num_stages=4),
        Variant("expand", "lora._expand", {"UNIT": 16}, types),
    ]


def cache_types(codes: str) -> dict[str, str]:
    """Return the types of an 8-bit KV cache."""
    return {"keys": codes, "values": codes, "key_scales": "*fp32", "value_scales": "*fp32"}


def scales_of(cache: Types) -> dict[str, Any]:
    """Return the constants that tell whether a KV cache has scales."""
    return {} if cache else dict.fromkeys(("key_scales", "value_scales"))


def product(
    name: str,
    table: LinearTable,
    tile: LinearTile,
    types: Types,
    weights: WeightFormat | None = None,
    *,
    kernel: str = "linear._linear",
    is_aligned: bool = True,
    has_bias: bool = False,
    **changes: object,
) -> Variant:
    """Return a variant of the product that adds to a residual, with some constants changed."""
    weights = weights or WeightFormat(PLAIN, types["weights"])
    constants: dict[str, Any] = {
        "FORMAT": weights.format,
        "SCALE_COLUMNS": weights.group_outputs,
        "SCALE_INPUTS": weights.group,
    }
    constants |= {"ADDS": True, "IS_SPLIT": False, "SPLITS": 1}
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "INPUTS": table.inputs}
    constants |= {"minima": None} if not weights.has_minimum else {}
    constants |= {"bias": None} if not has_bias else {}
    types = types | {"weights": weights.codes, "scales": weights.scales}
    launch = tile.num_warps, tile.num_stages, is_aligned
    return Variant(name, kernel, constants | changes, types, *launch, has_arithmetic=True)


def size_of(tile: LinearTile) -> str:
    return f"{tile.rows}x{tile.columns}"


def plain_products(table: LinearTable, types: Types) -> Iterator[Variant]:
    smallest, largest_with_splits = table.tiles[0], [tile for tile in table.tiles if tile.sums_per_thread <= 64][-1]
    rows: list[tuple[LinearTile, str, dict[str, Any]]] = [(tile, "", {}) for tile in table.tiles]
    rows.append((smallest, " with bias", {"has_bias": True, "ADDS": False}))
    rows.append((smallest, " alone", {"ADDS": False}))
    rows.append((smallest, " unaligned", {"is_aligned": False}))
    rows += [(tile, " of 2 splits", {"SPLITS": 2}) for tile in {smallest, largest_with_splits}]
    rows.append((smallest, " split", {"SPLITS": 2, "IS_SPLIT": True}))
    for tile, name, changes in rows:
        yield product(f"linear {size_of(tile)}{name}", table, tile, types, **changes)
    constants = {"bias": None, "ADDS": True, "SPLITS": 2, "COLUMNS": linear.SUM_COLUMNS}
    yield Variant("add_splits", "linear._add_splits", constants, types, has_arithmetic=True)


def attention_kernels(tiles: Tiles, types: Types, caches: Mapping[str, Types]) -> Iterator[Variant]:
    for size, block in HEADS.items():
        sizes = tiles.attention_for(size)
        constants: dict[str, Any] = {"PACKED": sizes.packed_rows, "SIZE": size, "BLOCK": block}
        constants |= {} if size in HEADS_WITH_SINKS else {"sinks": None}
        merging = constants | {"COLUMNS": min(block, attention.MERGED_COLUMNS)}
        yield Variant(f"reduce {size}", "attention._reduce", merging, types, sizes.num_warps, has_arithmetic=True)
        constants |= {} if size == 64 else {"window": None, "softcap": None}
        constants |= {"SEGMENT": sizes.segment, "KEYS": sizes.keys, "TOKENS": 32}
        for name, cache in caches.items():
            own, launch = constants | scales_of(cache), (sizes.num_warps, sizes.num_stages)
            yield Variant(f"attend {size}{name}", "attention._attend", own, types | cache, *launch, has_arithmetic=True)


def expert_kernels(tiles: Tiles, types: Types) -> Iterator[Variant]:
    chosen = {"NUM_EXPERTS": 256, "EXPERTS": 256, "NUM_CHOSEN": 8, "CHOSEN": 8}
    chosen |= {"IS_SIGMOID": True, "NORMALIZES": True, "NUM_GROUPS": 8, "GROUPS": 8}
    chosen |= {"NUM_BEST_GROUPS": 4, "TAKES_TWO": True}
    yield Variant("route", "experts._route", chosen, types | ROUTER_TYPES, num_warps=1)
    yield Variant("sort_pairs", "experts._sort_pairs", {"PAIRS": experts.SORTED_PAIRS}, types, num_warps=8)
    combined = {"NUM_CHOSEN": 8, "ADDS": True, "BLOCK": rows.ROW_COLUMNS}
    yield Variant("combine", "experts._combine", combined, types | {"weights": "*fp32"})
    gpt_oss: dict[str, Any] = {"NUM_EXPERTS": 32, "EXPERTS": 32, "PAIRS_OF_ROW": 4, "has_bias": True}
    gpt_oss["kernel"] = "experts._expert_linear"
    for name, table in (("", tiles.linear), (" float4", tiles.packed_linear)):
        for tile in table.tiles:
            weights = PACKED["float4"] if name else None
            yield product(f"expert_linear{name} {size_of(tile)}", table, tile, types, weights, **gpt_oss)


def row_kernels(types: Types, caches: Mapping[str, Types]) -> Iterator[Variant]:
    for name, is_layer_norm, adds in (
        ("rms_norm", False, False),
        ("rms_norm to a residual", False, True),
        ("layer_norm", True, False),
    ):
        yield Variant(name, "rows._norm", {"BLOCK": 4096, "IS_LAYER_NORM": is_layer_norm, "ADDS": adds}, types)
    block = {"BLOCK": rows.ROW_COLUMNS}
    yield Variant("add", "rows._add", block, types)
    yield Variant("scale", "rows._scale", block, types)
    for activation in ("silu", "gelu", "gelu_pytorch_tanh", "swigluoai"):
        yield Variant(f"act_and_mul {activation}", "rows._act_and_mul", {"ACTIVATION": activation, **block}, types)
    for name, cache in caches.items():
        for norms, own in (("", NO_NORMS | {"BLOCK": 128}), (" with norms", {"BLOCK": 512})):
            constants = {"TOKENS": 32, **scales_of(cache), **own}
            kernel = f"rope_and_store_kv{norms}{name}"
            yield Variant(kernel, "rows._rope_and_store_kv", constants, types | cache, num_warps=1)


def mixer_kernels(dtype: str) -> Iterator[Variant]:
    """Yield those of Qwen 3.5 4B and of LFM 2 1.2B."""
    delta = {"HEADS": 32, "KEY_SIZE": 128, "KEYS": 128, "VALUE_SIZE": 128, "CHANNELS": 8192}
    yield Variant("advance", "mixers._advance", delta, MIXER_TYPES, num_warps=1)
    types = MIXER_TYPES | {"rows": dtype}
    with_silu = {"CHANNELS": 8192, "SIZE": 8256, "CONV": 4, "HAS_SILU": True, "bias": None}
    yield Variant("convolve", "mixers._convolve", with_silu, types)
    with_bias = {"CHANNELS": 2048, "SIZE": 2048, "CONV": 3, "HAS_SILU": False}
    yield Variant("convolve with a bias", "mixers._convolve", with_bias, types)
