// The layout of every struct that Python fills in: all that Library in library.py compares when it loads the library.
#pragma once

#include <stddef.h>

#include "functions.h"

using lightwell::Call;

#define TEXT_OF(NAME) #NAME
#define TEXT(NAME) TEXT_OF(NAME)
#define FIELD(NAME) {TEXT(STRUCT), int64_t(sizeof(STRUCT)), #NAME, int64_t(offsetof(STRUCT, NAME))}

const lightwell::Field lightwell::FIELDS[] = {
#define STRUCT Call
    FIELD(function), FIELD(parameters),
#undef STRUCT
#define STRUCT RowCounts
    FIELD(all), FIELD(generated),
#undef STRUCT
#define STRUCT PreparedRows
    FIELD(form), FIELD(prompt_form), FIELD(rows), FIELD(stride),
#undef STRUCT
#define STRUCT PrepareParameters
    FIELD(num_rows), FIELD(input), FIELD(row_stride), FIELD(size), FIELD(output),
#undef STRUCT
#define STRUCT GatherParameters
    FIELD(num_rows), FIELD(row_index), FIELD(table), FIELD(table_stride), FIELD(size), FIELD(output),
    FIELD(output_stride),
#undef STRUCT
#define STRUCT NormParameters
    FIELD(num_rows), FIELD(input), FIELD(input_stride), FIELD(size), FIELD(weight), FIELD(epsilon), FIELD(output),
    FIELD(output_stride), FIELD(accumulate), FIELD(prepared),
#undef STRUCT
#define STRUCT AddParameters
    FIELD(num_rows), FIELD(input), FIELD(input_stride), FIELD(size), FIELD(scale), FIELD(output), FIELD(output_stride),
#undef STRUCT
#define STRUCT MeetParameters
    FIELD(counters), FIELD(num_met), FIELD(rank), FIELD(num_ranks),
#undef STRUCT
#define STRUCT ScaleParameters
    FIELD(num_rows), FIELD(values), FIELD(stride), FIELD(size), FIELD(scale), FIELD(softcap),
#undef STRUCT
#define STRUCT ActAndMulParameters
    FIELD(num_rows), FIELD(gate), FIELD(gate_stride), FIELD(up), FIELD(up_stride), FIELD(size), FIELD(activation),
    FIELD(output), FIELD(output_stride), FIELD(prepared),
#undef STRUCT
#define STRUCT PackParameters
    FIELD(data), FIELD(row_bytes), FIELD(num_inputs), FIELD(num_outputs), FIELD(output),
#undef STRUCT
#define STRUCT LinearParameters
    FIELD(num_rows), FIELD(input), FIELD(input_stride), FIELD(weights), FIELD(num_inputs), FIELD(num_outputs),
    FIELD(bias), FIELD(output), FIELD(output_stride), FIELD(accumulate),
#undef STRUCT
#define STRUCT ExpertRows
    FIELD(expert), FIELD(first), FIELD(num_rows),
#undef STRUCT
#define STRUCT Routing
    FIELD(num_pairs), FIELD(num_groups), FIELD(num_generated_groups), FIELD(groups), FIELD(experts), FIELD(weights),
    FIELD(rows), FIELD(places),
#undef STRUCT
#define STRUCT RouteParameters
    FIELD(num_rows), FIELD(logits), FIELD(logits_stride), FIELD(num_experts), FIELD(num_chosen), FIELD(scoring),
    FIELD(normalize), FIELD(scale), FIELD(num_groups), FIELD(num_best_groups), FIELD(group_scores), FIELD(bias),
    FIELD(expert_scales), FIELD(routing),
#undef STRUCT
#define STRUCT GatherPairsParameters
    FIELD(routing), FIELD(input), FIELD(stride), FIELD(output),
#undef STRUCT
#define STRUCT ExpertLinearParameters
    FIELD(routing), FIELD(weights), FIELD(bias_stride), FIELD(linear),
#undef STRUCT
#define STRUCT HeadLinearParameters
    FIELD(weights), FIELD(num_heads), FIELD(head_input_bytes), FIELD(linear),
#undef STRUCT
#define STRUCT CombineExpertsParameters
    FIELD(num_rows), FIELD(routing), FIELD(input), FIELD(input_stride), FIELD(size), FIELD(num_chosen), FIELD(output),
    FIELD(output_stride), FIELD(accumulate),
#undef STRUCT
#define STRUCT AddLoraParameters
    FIELD(num_rows), FIELD(lora_slots), FIELD(input), FIELD(input_stride), FIELD(num_inputs), FIELD(a),
    FIELD(a_stride), FIELD(b), FIELD(b_stride), FIELD(ranks), FIELD(part_ends), FIELD(num_parts), FIELD(max_rank),
    FIELD(shrunk), FIELD(output), FIELD(output_stride),
#undef STRUCT
#define STRUCT EmbedParameters
    FIELD(num_rows), FIELD(token_ids), FIELD(weights), FIELD(num_ids), FIELD(size), FIELD(output), FIELD(output_stride),
#undef STRUCT
#define STRUCT CacheParameters
    FIELD(type), FIELD(keys), FIELD(values), FIELD(key_scales), FIELD(value_scales), FIELD(block_size),
    FIELD(num_kv_heads), FIELD(head_dim), FIELD(block_stride), FIELD(scale_stride),
#undef STRUCT
#define STRUCT Heads
    FIELD(rows), FIELD(stride), FIELD(norm), FIELD(norm_size),
#undef STRUCT
#define STRUCT RopeAndStoreKvParameters
    FIELD(num_rows), FIELD(slot_mapping), FIELD(num_heads), FIELD(q), FIELD(k), FIELD(v), FIELD(q_rotations),
    FIELD(k_rotations), FIELD(epsilon), FIELD(cache),
#undef STRUCT
#define STRUCT AttentionItem
    FIELD(sequence), FIELD(first_row), FIELD(num_rows), FIELD(first_position), FIELD(first_chunk), FIELD(num_chunks),
    FIELD(partial),
#undef STRUCT
#define STRUCT AttentionMerge
    FIELD(first_item), FIELD(num_chunks),
#undef STRUCT
#define STRUCT AttentionPlan
    FIELD(num_items), FIELD(num_merges), FIELD(items), FIELD(merges), FIELD(max_partials), FIELD(partials),
    FIELD(scratch), FIELD(scratch_stride),
#undef STRUCT
#define STRUCT PlanAttentionParameters
    FIELD(num_seqs), FIELD(query_lens), FIELD(seq_lens), FIELD(num_heads), FIELD(num_kv_heads), FIELD(window),
    FIELD(plan),
#undef STRUCT
#define STRUCT PagedAttentionParameters
    FIELD(num_rows), FIELD(q), FIELD(q_stride), FIELD(num_heads), FIELD(scale), FIELD(window), FIELD(softcap),
    FIELD(sinks), FIELD(block_tables), FIELD(table_stride), FIELD(plan), FIELD(cache), FIELD(output),
    FIELD(output_stride), FIELD(prepared),
#undef STRUCT
#define STRUCT SampledRow
    FIELD(seed), FIELD(position), FIELD(first_id), FIELD(first_bias), FIELD(num_biased), FIELD(num_banned),
    FIELD(num_drafted), FIELD(history), FIELD(num_history), FIELD(num_prompt_tokens), FIELD(allowed), FIELD(top_k),
    FIELD(temperature), FIELD(top_p), FIELD(min_p), FIELD(repetition_penalty), FIELD(frequency_penalty),
    FIELD(presence_penalty),
#undef STRUCT
#define STRUCT SampleParameters
    FIELD(num_rows), FIELD(logits), FIELD(logits_stride), FIELD(vocab_size), FIELD(rows), FIELD(ids), FIELD(biases),
    FIELD(token_ids), FIELD(is_finite), FIELD(scratch), FIELD(scratch_stride),
#undef STRUCT
    {nullptr, 0, nullptr, 0},
};

#undef FIELD
#undef TEXT
#undef TEXT_OF
