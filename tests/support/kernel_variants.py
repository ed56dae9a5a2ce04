"""The variants of the Triton kernels that a card runs, as data for `tests/support/compiled_kernels.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from engine.kernels.triton import attention, experts, linear, lora, rows, sampler
from engine.kernels.triton.tiles import SMALLEST, TABLE, LinearTable, LinearTile, Tiles
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
NO_NORMS = {"HAS_Q_NORM": False, "HAS_K_NORM": False, "HAS_V_NORM": False}
NO_NORMS |= dict.fromkeys(("q_weight", "k_weight", "v_weight"))  # type: ignore[arg-type]


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
    found = [*plain_products(tiles.linear, types)]
    float8 = "*fp8e4nv" if target in ("cuda 8.9", "cuda 9.0", "cuda 10.0", "cuda 12.0") else "*u8"  # or its bits
    for name, weights in PACKED.items():
        codes = float8 if name == "float8" else weights.codes
        found += packed_products(name, weights._replace(codes=codes), tiles.packed_linear, types)
    caches = {"": {}, " int8": cache_types("*i8"), " float8": cache_types(float8)}
    found += attention_kernels(tiles, types, caches)
    found += expert_kernels(tiles, types)
    return [*found, *row_kernels(types, caches), *lora_kernels(types), *sampler_kernels()]


def cache_types(codes: str) -> dict[str, str]:
    """Return the types of an 8-bit KV cache."""
    return {"keys": codes, "values": codes, "key_scales": "*fp32", "value_scales": "*fp32"}


def product(
    name: str,
    table: LinearTable,
    tile: LinearTile,
    types: Mapping[str, str],
    weights: WeightFormat | None = None,
    *,
    is_aligned: bool = True,
    **changes: object,
) -> Variant:
    """Return a variant of the product that adds to a residual, with some constants changed."""
    weights = weights or WeightFormat(PLAIN, types["weights"])
    constants = {"FORMAT": weights.format, "SCALE_COLUMNS": weights.group_outputs, "SCALE_INPUTS": weights.group}
    constants |= {"HAS_MINIMUM": weights.has_minimum, "HAS_BIAS": False, "ADDS": True, "IS_SPLIT": False, "SPLITS": 1}
    constants |= {"ROWS": tile.rows, "COLUMNS": tile.columns, "INPUTS": table.inputs, "GROUP": linear.ROW_GROUP}
    types = dict(types) | {"weights": weights.codes, "scales": weights.scales}
    return Variant(
        f"linear {name}",
        "linear._linear",
        constants | changes,
        types,
        tile.num_warps,
        tile.num_stages,
        is_aligned=is_aligned,
        has_arithmetic=True,
    )


def size_of(tile: LinearTile) -> str:
    return f"{tile.rows}x{tile.columns}"


def plain_products(table: LinearTable, types: Mapping[str, str]) -> Iterator[Variant]:
    for tile in table.tiles:
        yield product(size_of(tile), table, tile, types)
    smallest, size = table.tiles[0], size_of(table.tiles[0])
    yield product(f"{size} with bias", table, smallest, types, HAS_BIAS=True, ADDS=False)
    yield product(f"{size} alone", table, smallest, types, ADDS=False)
    yield product(f"{size} unaligned", table, smallest, types, is_aligned=False)
    for tile in {smallest, [tile for tile in table.tiles if tile.sums_per_thread <= 64][-1]}:
        yield product(f"{size_of(tile)} of 2 splits", table, tile, types, SPLITS=2)
    yield product(f"{size} split", table, smallest, types, SPLITS=2, IS_SPLIT=True)
    constants = {"HAS_BIAS": False, "ADDS": True, "SPLITS": 2, "COLUMNS": linear.SUM_COLUMNS}
    yield Variant("add_splits", "linear._add_splits", constants, dict(types), has_arithmetic=True)


def packed_products(
    name: str, weights: WeightFormat, table: LinearTable, types: Mapping[str, str]
) -> Iterator[Variant]:
    for tile in table.tiles:
        yield product(f"{name} {size_of(tile)}", table, tile, types, weights)


def attention_kernels(
    tiles: Tiles, types: Mapping[str, str], caches: Mapping[str, dict[str, str]]
) -> Iterator[Variant]:
    for size, block in HEADS.items():
        sizes = tiles.attention_for(size)
        has_sinks = size in HEADS_WITH_SINKS
        constants: dict[str, Any] = {"PACKED": sizes.packed_rows, "SIZE": size, "BLOCK": block}
        constants |= {} if has_sinks else {"sinks": None}
        merging = constants | {"COLUMNS": min(block, attention.MERGED_COLUMNS)}
        yield Variant(f"reduce {size}", "attention._reduce", merging, dict(types), sizes.num_warps, has_arithmetic=True)
        has_window = size == 64
        constants |= {"HAS_WINDOW": has_window, "HAS_SOFTCAP": has_window, "SEGMENT": sizes.segment}
        constants |= {"KEYS": sizes.keys, "TOKENS": 32}
        for name, cache in caches.items():
            constants["HAS_SCALES"] = bool(cache)
            no_scales = {} if cache else dict.fromkeys(("key_scales", "value_scales"))
            yield Variant(
                f"attend {size}{name}",
                "attention._attend",
                constants | no_scales,
                dict(types) | cache,
                sizes.num_warps,
                sizes.num_stages,
                has_arithmetic=True,
            )


def expert_kernels(tiles: Tiles, types: Mapping[str, str]) -> Iterator[Variant]:
    chosen = {"NUM_EXPERTS": 256, "EXPERTS": 256, "NUM_CHOSEN": 8, "CHOSEN": 8, "HAS_BIAS": True, "HAS_SCALES": True}
    chosen |= {"IS_SIGMOID": True, "NORMALIZES": True, "NUM_GROUPS": 8, "GROUPS": 8}
    chosen |= {"NUM_BEST_GROUPS": 4, "TAKES_TWO": True}
    yield Variant("route", "experts._route", chosen, dict(types) | ROUTER_TYPES, num_warps=1)
    yield Variant("sort_pairs", "experts._sort_pairs", {"PAIRS": experts.SORTED_PAIRS}, dict(types), num_warps=8)
    combined = {"NUM_CHOSEN": 8, "ADDS": True, "BLOCK": rows.ROW_COLUMNS}
    yield Variant("combine", "experts._combine", combined, dict(types) | {"weights": "*fp32"})
    constants: dict[str, Any] = {"NUM_EXPERTS": 32, "EXPERTS": 32, "PAIRS_OF_ROW": 4, "HAS_BIAS": True}  # gpt-oss
    for name, table in (("", tiles.linear), (" float4", tiles.packed_linear)):
        weights = PACKED["float4"] if name else None
        for tile in table.tiles:
            variant = product(f"{name} {size_of(tile)}", table, tile, types, weights, **constants)
            yield msgspec.structs.replace(
                variant, name=f"expert_linear{name} {size_of(tile)}", kernel="experts._expert_linear"
            )


def row_kernels(types: Mapping[str, str], caches: Mapping[str, dict[str, str]]) -> Iterator[Variant]:
    for name, flags in (
        ("rms_norm", (False, False)),
        ("rms_norm to a residual", (False, True)),
        ("layer_norm", (True, False)),
    ):
        constants: dict[str, Any] = {"BLOCK": 4096, "IS_LAYER_NORM": flags[0], "ADDS": flags[1]}
        yield Variant(name, "rows._norm", constants, dict(types))
    yield Variant("add", "rows._add", {"BLOCK": rows.ROW_COLUMNS}, dict(types))
    yield Variant("scale", "rows._scale", {"BLOCK": rows.ROW_COLUMNS, "HAS_SOFTCAP": True}, dict(types))
    for activation in ("silu", "gelu", "gelu_pytorch_tanh", "swigluoai"):
        constants = {"ACTIVATION": activation, "BLOCK": rows.ROW_COLUMNS}
        yield Variant(f"act_and_mul {activation}", "rows._act_and_mul", constants, dict(types))
    for name, cache in caches.items():
        stored: dict[str, Any] = {"BLOCK": 128, "TOKENS": 32, "HAS_SCALES": bool(cache)}
        stored |= {} if cache else dict.fromkeys(("key_scales", "value_scales"))
        types_of_cache, kernel = dict(types) | cache, "rows._rope_and_store_kv"
        yield Variant(f"rope_and_store_kv{name}", kernel, stored | NO_NORMS, types_of_cache, num_warps=1)
        stored |= {"HAS_Q_NORM": True, "HAS_K_NORM": True, "HAS_V_NORM": True, "BLOCK": 512}
        yield Variant(f"rope_and_store_kv with norms{name}", kernel, stored, types_of_cache, num_warps=1)


def lora_kernels(types: Mapping[str, str]) -> Iterator[Variant]:
    constants = {"ROWS": lora.ROWS, "RANKS": lora.RANKS, "INPUTS": lora.INPUTS, "SPLIT_INPUTS": lora.SPLIT_INPUTS}
    yield Variant("shrink", "lora._shrink", constants, dict(types), num_warps=2, num_stages=4)
    constants = {"UNIT": 16, "ROWS": lora.ROWS, "RANKS": lora.RANKS, "COLUMNS": lora.COLUMNS}
    yield Variant("expand", "lora._expand", constants, dict(types))


def sampler_kernels() -> Iterator[Variant]:
    pieces = dict.fromkeys(("forbid", "collect", "draw"), sampler.PIECE)
    pieces |= dict.fromkeys(("add_biases", "penalise"), sampler.ID_PIECE)
    for name, piece in pieces.items():
        yield Variant(name, f"sampler._{name}", {"PIECE": piece}, SAMPLER_TYPES, sampler.NUM_WARPS)
    for is_changed in (False, True):
        constants = {"PIECE": sampler.PIECE, "IS_CHANGED": is_changed}
        yield Variant(f"top {is_changed}", "sampler._top", constants, SAMPLER_TYPES, sampler.NUM_WARPS)
