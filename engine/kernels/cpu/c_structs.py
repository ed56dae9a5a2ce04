"""The structures that the C++ functions read their parameters from.

Each has the name and the fields of a struct in the C++ sources. `engine.kernels.cpu.library` compares size and offsets
with the compiled library when it is loaded.

Pointers refer to buffers that live as long as the program. Numbers that differ from step to step are read through a
pointer: `num_rows`, for one, points to RowCounts.
"""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int64, c_uint64, c_void_p


class Call(Structure):
    """A function and its parameters: an entry of a program."""

    _fields_ = [("function", c_void_p), ("parameters", c_void_p)]


class RowCounts(Structure):
    """The number of all rows, and of the rows of generated tokens, which come before those of prompts."""

    _fields_ = [("all", c_int64), ("generated", c_int64)]


class PreparedRows(Structure):
    _fields_ = [("form", c_int64), ("prompt_form", c_int64), ("rows", c_void_p), ("stride", c_int64)]


class PrepareParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("input", c_void_p),
        ("row_stride", c_int64),
        ("size", c_int64),
        ("output", PreparedRows),
    ]


class GatherParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("row_index", c_void_p),
        ("table", c_void_p),
        ("table_stride", c_int64),
        ("size", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


class NormParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("size", c_int64),
        ("weight", c_void_p),
        ("epsilon", c_double),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("accumulate", c_int64),
        ("prepared", PreparedRows),
    ]


class AddParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("size", c_int64),
        ("scale", c_double),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


class MeetParameters(Structure):
    _fields_ = [("counters", c_void_p), ("num_met", c_void_p), ("rank", c_int64), ("num_ranks", c_int64)]


class ScaleParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("values", c_void_p),
        ("stride", c_int64),
        ("size", c_int64),
        ("scale", c_double),
        ("softcap", c_double),
    ]


class ActAndMulParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("gate", c_void_p),
        ("gate_stride", c_int64),
        ("up", c_void_p),
        ("up_stride", c_int64),
        ("size", c_int64),
        ("activation", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("prepared", PreparedRows),
    ]


class PackParameters(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("row_bytes", c_int64),
        ("num_inputs", c_int64),
        ("num_outputs", c_int64),
        ("output", c_void_p),
    ]


class LinearParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("weights", c_void_p),
        ("num_inputs", c_int64),
        ("num_outputs", c_int64),
        ("bias", c_void_p),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("accumulate", c_int64),
    ]


class ExpertRows(Structure):
    """Successive pairs of one expert."""

    _fields_ = [("expert", c_int64), ("first", c_int64), ("num_rows", c_int64)]


class Routing(Structure):
    """The experts of each row: pairs of a row and an expert, sorted by expert."""

    _fields_ = [
        ("num_pairs", RowCounts),
        ("num_groups", c_int64),
        ("num_generated_groups", c_int64),
        ("groups", c_void_p),
        ("experts", c_void_p),
        ("weights", c_void_p),
        ("rows", c_void_p),
        ("places", c_void_p),
    ]


class RouteParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("num_experts", c_int64),
        ("num_chosen", c_int64),
        ("scoring", c_int64),
        ("normalize", c_int64),
        ("scale", c_double),
        ("num_groups", c_int64),
        ("num_best_groups", c_int64),
        ("group_scores", c_int64),
        ("bias", c_void_p),
        ("expert_scales", c_void_p),
        ("routing", c_void_p),
    ]


class GatherPairsParameters(Structure):
    _fields_ = [("routing", c_void_p), ("input", c_void_p), ("stride", c_int64), ("output", c_void_p)]


class ExpertLinearParameters(Structure):
    _fields_ = [("routing", c_void_p), ("weights", c_void_p), ("bias_stride", c_int64), ("linear", LinearParameters)]


class HeadLinearParameters(Structure):
    _fields_ = [
        ("weights", c_void_p),
        ("num_heads", c_int64),
        ("head_input_bytes", c_int64),
        ("linear", LinearParameters),
    ]


class CombineExpertsParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("routing", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("size", c_int64),
        ("num_chosen", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("accumulate", c_int64),
    ]


class AddLoraParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("lora_slots", c_void_p),
        ("input", c_void_p),
        ("input_stride", c_int64),
        ("num_inputs", c_int64),
        ("a", c_void_p),
        ("a_stride", c_int64),
        ("b", c_void_p),
        ("b_stride", c_int64),
        ("ranks", c_void_p),
        ("part_ends", c_void_p),
        ("num_parts", c_int64),
        ("max_rank", c_int64),
        ("shrunk", c_void_p),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


class EmbedParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("token_ids", c_void_p),
        ("weights", c_void_p),
        ("num_ids", c_int64),
        ("size", c_int64),
        ("output", c_void_p),
        ("output_stride", c_int64),
    ]


class CacheParameters(Structure):
    _fields_ = [
        ("type", c_int64),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("block_size", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("block_stride", c_int64),
        ("scale_stride", c_int64),
    ]


class Heads(Structure):
    """The heads of each row, and their RMS norm."""

    _fields_ = [("rows", c_void_p), ("stride", c_int64), ("norm", c_void_p), ("norm_size", c_int64)]


class RopeAndStoreKvParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("slot_mapping", c_void_p),
        ("num_heads", c_int64),
        ("q", Heads),
        ("k", Heads),
        ("v", Heads),
        ("q_rotations", c_void_p),
        ("k_rotations", c_void_p),
        ("epsilon", c_double),
        ("cache", CacheParameters),
    ]


class AttentionItem(Structure):
    """Consecutive rows of one sequence, over some chunks of its keys."""

    _fields_ = [
        ("sequence", c_int64),
        ("first_row", c_int64),
        ("num_rows", c_int64),
        ("first_position", c_int64),
        ("first_chunk", c_int64),
        ("num_chunks", c_int64),
        ("partial", c_int64),
    ]


class AttentionMerge(Structure):
    """Items of the same rows, whose results are merged."""

    _fields_ = [("first_item", c_int64), ("num_chunks", c_int64)]


class AttentionPlan(Structure):
    _fields_ = [
        ("num_items", c_int64),
        ("num_merges", c_int64),
        ("items", c_void_p),
        ("merges", c_void_p),
        ("max_partials", c_int64),
        ("partials", c_void_p),
        ("scratch", c_void_p),
        ("scratch_stride", c_int64),
    ]


class PlanAttentionParameters(Structure):
    _fields_ = [
        ("num_seqs", c_void_p),
        ("query_lens", c_void_p),
        ("seq_lens", c_void_p),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("window", c_int64),
        ("plan", c_void_p),
    ]


class PagedAttentionParameters(Structure):
    _fields_ = [
        ("num_rows", c_void_p),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("num_heads", c_int64),
        ("scale", c_double),
        ("window", c_int64),
        ("softcap", c_double),
        ("sinks", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("plan", c_void_p),
        ("cache", CacheParameters),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("prepared", PreparedRows),
    ]


class SampledRow(Structure):
    """The settings of one row. Sampling is greedy if all of them are 0."""

    _fields_ = [
        ("seed", c_uint64),
        ("position", c_int64),
        ("first_id", c_int64),
        ("first_bias", c_int64),
        ("num_biased", c_int64),
        ("num_banned", c_int64),
        ("num_drafted", c_int64),
        ("history", c_void_p),
        ("num_history", c_int64),
        ("num_prompt_tokens", c_int64),
        ("allowed", c_void_p),
        ("top_k", c_int64),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("repetition_penalty", c_float),
        ("frequency_penalty", c_float),
        ("presence_penalty", c_float),
    ]


class SampleParameters(Structure):
    _fields_ = [
        ("num_rows", c_int64),
        ("logits", c_void_p),
        ("logits_stride", c_int64),
        ("vocab_size", c_int64),
        ("rows", c_void_p),
        ("ids", c_void_p),
        ("biases", c_void_p),
        ("token_ids", c_void_p),
        ("is_finite", c_void_p),
        ("scratch", c_void_p),
        ("scratch_stride", c_int64),
    ]


STRUCTURES = [kind for kind in list(globals().values()) if isinstance(kind, type) and kind.__base__ is Structure]
