// The structs that Python fills in. c_structs.py reads this file and makes a ctypes class of each. Each line of a struct
// is a field: of a type in its table TYPES, of a struct further up, or a pointer, which is an address in Python.
//
// Pointers refer to buffers that live as long as the program. Numbers that differ from step to step are read through a
// pointer: `num_rows`, for one. Shapes use the letters of engine/kernels/interface.py.
#pragma once

#include <stdint.h>

namespace lightwell {

struct Worker;

// A function of a program.
using Function = void (*)(const void* parameters, const Worker& worker);

// A function and its parameters: an entry of a program.
struct Call {
    Function function;
    const void* parameters;
};

}  // namespace lightwell

namespace {

struct MeetCounter;  // of meet.h

// The number of rows of a batch. The first `generated` rows are those of generated tokens, the others those of prompts.
struct RowCounts {
    int64_t all;
    int64_t generated;
};

// The buffer for the input rows of a product.
struct PreparedRows {
    int64_t form;  // InputForm of generated tokens
    int64_t prompt_form;  // and of prompts
    uint8_t* rows;  // or null
    int64_t stride;  // bytes
};

struct PrepareParameters {
    const RowCounts* num_rows;
    const float* input;
    int64_t row_stride;  // floats
    int64_t size;
    PreparedRows output;
};

struct GatherParameters {
    const RowCounts* num_rows;
    const int64_t* row_index;
    const float* table;
    int64_t table_stride;  // floats
    int64_t size;
    float* output;
    int64_t output_stride;
};

struct AddParameters {
    const RowCounts* num_rows;
    const float* input;
    int64_t input_stride;
    int64_t size;
    double scale;  // of the input
    float* output;
    int64_t output_stride;
};

struct ScaleParameters {
    const RowCounts* num_rows;
    float* values;
    int64_t stride;
    int64_t size;
    double scale;
    double softcap;  // values become softcap * tanh(scale * value / softcap); 0: scale * value
};

struct GateRowsParameters {
    const RowCounts* num_rows;
    const float* input;
    int64_t input_stride;
    const float* gate;  // a number for each row
    int64_t gate_stride;
    int64_t size;
    float* output;
    int64_t output_stride;
};

struct ActAndMulParameters {
    const RowCounts* num_rows;
    const float* gate;
    int64_t gate_stride;
    const float* up;
    int64_t up_stride;
    int64_t size;
    int64_t activation;  // Activation of rows.h
    float* output;  // or null
    int64_t output_stride;
    PreparedRows prepared;
};

struct NormParameters {
    const RowCounts* num_rows;
    const float* input;
    int64_t input_stride;
    int64_t size;
    const float* weight;
    double epsilon;
    float* output;  // or null
    int64_t output_stride;
    int64_t accumulate;  // whether to add to the output
    PreparedRows prepared;  // the same rows in the input form of the next product
};

struct MeetParameters {
    MeetCounter* counters;  // of each process, in shared memory
    int64_t* num_met;  // of this process
    int64_t rank;
    int64_t num_ranks;
};

struct PackParameters {
    const uint8_t* data;  // contiguous rows
    int64_t row_bytes;
    int64_t num_inputs;
    int64_t num_outputs;
    uint8_t* output;  // zeroed
};

struct LinearParameters {
    const RowCounts* num_rows;
    const uint8_t* input;  // in the input form of the weights
    int64_t input_stride;  // bytes
    const uint8_t* weights;
    int64_t num_inputs;
    int64_t num_outputs;
    const float* bias;  // or null
    float* output;
    int64_t output_stride;  // floats
    int64_t accumulate;  // whether to add to the output
};

struct EmbedParameters {
    const RowCounts* num_rows;
    const int64_t* token_ids;
    const uint8_t* weights;
    int64_t num_ids;
    int64_t size;  // inputs of the packed matrix, whose columns are the embeddings
    float* output;
    int64_t output_stride;  // floats
};

struct AddLoraParameters {
    const RowCounts* num_rows;
    const int64_t* lora_slots;  // [T] the slot of each row's adapter, -1: none
    const float* input;
    int64_t input_stride;  // floats
    int64_t num_inputs;
    const uint8_t* a;  // [slots, parts, max_rank, a_stride], rows padded to whole vectors
    int64_t a_stride;
    const uint8_t* b;  // [slots, max_rank, b_stride], rows padded by more than a vector
    int64_t b_stride;
    const int64_t* ranks;  // [slots, parts]
    const int64_t* part_ends;  // [parts] the output after the last of each part
    int64_t num_parts;
    int64_t max_rank;
    float* shrunk;  // [rows, parts, max_rank]
    float* output;
    int64_t output_stride;
};

// Successive pairs of one expert.
struct ExpertRows {
    int64_t expert;
    int64_t first;
    int64_t num_rows;
};

// The experts of each row: pairs of a row and an expert, sorted by expert.
struct Routing {
    RowCounts num_pairs;
    int64_t num_groups;
    int64_t num_generated_groups;  // those of generated tokens come first
    ExpertRows* groups;  // [2 E]
    int64_t* experts;  // [T, k] in descending order of their scores
    float* weights;  // [T, k]
    int64_t* rows;  // [P] row of each sorted pair
    int64_t* places;  // [T, k] place of each pair among the sorted ones
};

struct RouteParameters {
    const RowCounts* num_rows;
    const float* logits;
    int64_t logits_stride;
    int64_t num_experts;
    int64_t num_chosen;  // experts of a row
    int64_t scoring;  // RouterScoring of experts.h
    int64_t normalize;
    double scale;
    int64_t num_groups;  // of experts, of which the best `num_best_groups` are kept
    int64_t num_best_groups;
    int64_t group_scores;  // highest scores of a group that are added up: 1 or 2
    const float* bias;  // [E] added to the scores for the choice, or null
    const float* expert_scales;  // [E] or null
    Routing* routing;
};

struct GatherPairsParameters {
    const Routing* routing;
    const uint8_t* input;
    int64_t stride;  // bytes, of input and output
    uint8_t* output;
};

struct ExpertLinearParameters {
    const Routing* routing;
    const uint8_t* const* weights;  // [E]
    int64_t bias_stride;  // floats, from one expert to the next
    LinearParameters linear;  // without rows, and with the bias of expert 0; not accumulating
};

struct HeadLinearParameters {
    const uint8_t* const* weights;  // [H]
    int64_t num_heads;
    int64_t head_input_bytes;
    LinearParameters linear;  // of the first head
};

struct CombineExpertsParameters {
    const RowCounts* num_rows;
    const Routing* routing;
    const float* input;  // [P, size] in the order of sorted pairs
    int64_t input_stride;  // floats
    int64_t size;
    int64_t num_chosen;
    float* output;
    int64_t output_stride;
    int64_t accumulate;  // whether to add to the output
};

struct CacheParameters {
    int64_t type;  // CacheType of kv_cache.h
    uint8_t* keys;
    uint8_t* values;
    float* key_scales;  // int8 only
    float* value_scales;
    int64_t block_size;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t block_stride;  // numbers of keys or values from one block to the next
    int64_t scale_stride;  // scales from one block to the next
};

// The heads of each row, [T, heads, D], and their RMS norm.
struct Heads {
    float* rows;
    int64_t stride;  // floats from one row to the next
    const float* norm;  // weights, or null
    int64_t norm_size;  // numbers that are normed together: those of one head, or of all
};

struct RopeAndStoreKvParameters {
    const RowCounts* num_rows;
    const int64_t* slot_mapping;  // [T] block id * N + offset; negative: nothing is stored
    int64_t num_heads;
    Heads q;  // normed and rotated in place
    Heads k;  // without rows, only q is rotated
    Heads v;
    const float* q_rotations;  // [T, D] cosines of D / 2 pairs, then their sines
    const float* k_rotations;
    double epsilon;
    CacheParameters cache;
};

// The states of a layer that has a mixer in place of attention, in blocks, and what each sequence of a step does to them.
struct StateMove {
    int64_t first_row;
    int64_t num_rows;
    int64_t num_drafts;  // last rows, whose state is not kept; they are in the journal
    int64_t num_replayed;  // rows of the journal that come before the first one
    int64_t source;  // block of the state before; -1: zeros
    int64_t target;  // block of the state after
};

struct StateParameters {
    float* blocks;  // the layer's state in block 0
    int64_t block_stride;  // floats from one block to the next
    const int64_t* num_seqs;
    const StateMove* moves;  // [S]
};

struct GatedDeltaNetParameters {
    StateParameters states;
    const float* input;  // [T] queries, keys and values before the convolution, write strengths, steps, output gates
    int64_t input_stride;  // floats
    int64_t num_key_heads;
    int64_t num_value_heads;
    int64_t is_tiled;  // value head i has key head i % num_key_heads, not i / (num_value_heads / num_key_heads)
    int64_t key_size;  // of a head
    int64_t value_size;
    int64_t conv_size;
    const float* conv;  // [conv_size, channels] weights of the row conv_size - 1 before, ..., of the row itself
    const float* decay;  // [value heads] exp(A_log)
    const float* step_bias;  // [value heads]
    const float* norm;  // [value_size] weights
    double epsilon;
    float* output;
    int64_t output_stride;
};

struct ShortConvParameters {
    StateParameters states;
    const float* input;  // [T, channels]
    int64_t input_stride;  // floats
    const float* gate;  // [T, channels] of the output
    int64_t gate_stride;
    int64_t num_channels;
    int64_t conv_size;
    const float* conv;  // [conv_size, channels]
    const float* bias;  // [channels] or null
    float* output;
    int64_t output_stride;
};

// The unit of work of the threads: consecutive rows of one sequence, over some chunks of its keys.
struct AttentionItem {
    int64_t sequence;
    int64_t first_row;
    int64_t num_rows;
    int64_t first_position;
    int64_t first_chunk;
    int64_t num_chunks;
    int64_t partial;  // index in `partials` of the result to be merged; -1: the item covers all chunks that its rows see
};

// Successive items of the same rows, one for each chunk.
struct AttentionMerge {
    int64_t first_item;
    int64_t num_chunks;
};

struct AttentionPlan {
    int64_t num_items;
    int64_t num_merges;
    AttentionItem* items;
    AttentionMerge* merges;
    int64_t max_partials;
    float* partials;  // [max_partials, KH, packed rows, D + 2]: weighted values, highest score, sum of weights
    float* scratch;  // for each thread, packed rows of D + 2 and then of D
    int64_t scratch_stride;
};

struct PlanAttentionParameters {
    const int64_t* num_seqs;
    const int64_t* query_lens;
    const int64_t* seq_lens;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t window;  // tokens that a query sees, itself included; 0: all
    AttentionPlan* plan;
};

struct PagedAttentionParameters {
    const RowCounts* num_rows;
    const float* q;
    int64_t q_stride;  // floats
    int64_t num_heads;
    double scale;
    int64_t window;  // that of the plan
    double softcap;  // scores become softcap * tanh(score / softcap); 0: unchanged
    const float* sinks;  // [H] a score of each head that takes part in the softmax, without a value; or null
    const int64_t* block_tables;
    int64_t table_stride;
    const AttentionPlan* plan;
    CacheParameters cache;
    float* output;  // or null
    int64_t output_stride;
    PreparedRows prepared;  // the same rows in the input form of the next product; D must be whole groups
};

// The settings of one row. Sampling is greedy if all of them are 0.
struct SampledRow {
    uint64_t seed;
    int64_t position;  // in the output
    int64_t first_id;  // of the row in `ids`: biased tokens, banned tokens, then the draft if there are penalties
    int64_t first_bias;  // of the row in `biases`
    int64_t num_biased;
    int64_t num_banned;
    int64_t num_drafted;
    const int32_t* history;  // prompt and output without the draft; null without penalties
    int64_t num_history;
    int64_t num_prompt_tokens;
    const uint8_t* allowed;  // bit i of byte j: whether token 8 j + i may be sampled; null: all tokens may
    int64_t top_k;
    float temperature;  // 0: greedy
    float top_p;
    float min_p;
    float repetition_penalty;
    float frequency_penalty;
    float presence_penalty;
};

struct SampleParameters {
    int64_t num_rows;
    float* logits;  // changed in place
    int64_t logits_stride;  // floats
    int64_t vocab_size;
    const SampledRow* rows;
    const int32_t* ids;
    const float* biases;
    int64_t* token_ids;
    uint8_t* is_finite;
    uint8_t* scratch;  // for each thread: values and weights with room for two more vectors, then a zero for each token
    int64_t scratch_stride;  // bytes
};

}  // namespace
