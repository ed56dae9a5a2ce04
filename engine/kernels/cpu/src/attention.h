// Flash attention (Dao et al. 2022) over a paged KV cache.
//
// Keys are cut into chunks of CHUNK tokens aligned to position 0. Within a chunk all scores of a query are computed at
// once; chunks are merged in ascending order by the running softmax. If few sequences are long, threads share them chunk
// by chunk, and the results are merged in the same order by the same arithmetic: the bits do not depend on how the work
// is cut. The query heads that share a KV head (grouped-query attention) are computed together, so that a block of keys
// or values is loaded once for several pairs of token and head. Such a pair is called a packed row.
#pragma once

#include <math.h>

#include "kv_cache.h"

namespace {

constexpr int64_t CHUNK = 256;  // tokens
constexpr int64_t MAX_PACKED = 48;  // packed rows of an item, unless a KV head has more query heads than that
constexpr int TILE_ROWS = NUM_REGISTERS == 32 ? 12 : 2;  // packed rows in registers
constexpr int NUM_SUMS = NUM_REGISTERS == 32 ? 24 : 4;  // vectors in registers

// Vectors of values computed together: as many as fit into the registers, up to four (a head size of 64).
constexpr int value_vectors(int num_rows) { return num_rows * 4 <= NUM_SUMS ? 4 : 2; }

inline int64_t rows_of_item(int64_t group_size) { return max_of(1, MAX_PACKED / group_size); }

INLINE int64_t first_visible(int64_t position, int64_t window) { return window ? max_of(0, position - window + 1) : 0; }

// Returns the number of chunks from the first to the last that rows at these positions see.
INLINE int64_t visible_chunks(int64_t first_position, int64_t last_position, int64_t window) {
    return last_position / CHUNK - first_visible(first_position, window) / CHUNK + 1;
}

// Makes the plan, on one thread. The cost of a row is the number of chunks that it sees, about that of its sequence's last.
inline void plan_attention(const void* parameters, const Worker& worker) {
    if (worker.index != 0) return;
    const PlanAttentionParameters& p = *(const PlanAttentionParameters*)parameters;
    AttentionPlan& plan = *p.plan;
    const int64_t tile = rows_of_item(p.num_heads / p.num_kv_heads);
    int64_t total = 0;
    for (int64_t s = 0; s < *p.num_seqs; s++)
        total += p.query_lens[s] * visible_chunks(p.seq_lens[s] - 1, p.seq_lens[s] - 1, p.window);
    // The maximum cost of a task, which is an item of one KV head.
    const int64_t share = total * p.num_kv_heads / (4 * num_threads(worker));
    plan.num_items = plan.num_merges = 0;
    int64_t num_partials = 0, first_row = 0;
    for (int64_t s = 0; s < *p.num_seqs; s++) {
        for (int64_t r = 0; r < p.query_lens[s]; r += tile) {
            const int64_t rows = min_of(tile, p.query_lens[s] - r), position = p.seq_lens[s] - p.query_lens[s] + r;
            const int64_t chunks = visible_chunks(position, position + rows - 1, p.window);
            const int64_t first_chunk = first_visible(position, p.window) / CHUNK;
            const bool is_cut = num_threads(worker) > 1 && chunks > 1 && rows * chunks > share && num_partials + chunks <= plan.max_partials;
            if (is_cut) plan.merges[plan.num_merges++] = {plan.num_items, chunks};
            for (int64_t c = 0; c < (is_cut ? chunks : 1); c++)
                plan.items[plan.num_items++] = {s, first_row + r, rows, position, first_chunk + c, is_cut ? 1 : chunks, is_cut ? num_partials++ : -1};
        }
        first_row += p.query_lens[s];
    }
}

// The number types of keys, queries, values and weights.

struct BFloat16Cache {
    using Element = uint16_t;
    using Query = uint16_t;
    static constexpr int TOGETHER = 2;  // dimensions of a key, or tokens of a value, in a lane
    struct Vector { Ints v; };
    static INLINE Vector load_vector(const Element* p) { return {load_ints((const int32_t*)p)}; }
    static void write_query(const float* q, int64_t size, Query* out) { write_bfloat16(q, size, out); }
    static INLINE Vector broadcast(const Query* p) { return {fill_ints(load_int32(p))}; }
    static INLINE Floats add(Floats sum, Vector a, Vector b) { return dot_pairs(sum, a.v, b.v); }
    static INLINE Vector without_second(Vector a) { return {a.v & fill_ints(0xffff)}; }
    static constexpr float UNIT = 1.44269504088896341f;  // log2(e), because weights are powers of two
    static INLINE Floats write_weight(Floats x, Query* out) { return store_rounded(out, rough_power_of_two(x)); }
};

template <class Element_>
struct PlainCache {
    using Element = Element_;
    using Query = float;
    static constexpr int TOGETHER = 1;
    struct Vector { Floats v; };
    static INLINE Vector load_vector(const float* p) { return {load(p)}; }
    static void write_query(const float* q, int64_t size, Query* out) { memcpy(out, q, size_t(size) * 4); }
    static INLINE Vector load_vector(const int8_t* p) { return {load_int8(p)}; }
    static INLINE Vector broadcast(const Query* p) { return {fill(*p)}; }
    static INLINE Floats add(Floats sum, Vector a, Vector b) { return multiply_add(a.v, b.v, sum); }
    static INLINE Vector without_second(Vector a) { return a; }
    static constexpr float UNIT = 1.0f;
    static INLINE Floats write_weight(Floats x, Query* out) {
        const Floats weight = exponential(x);
        store(out, weight);
        return weight;
    }
};

// Computes the packed rows of one item for one KV head.
template <class Cache>
struct Attention {
    using Element = typename Cache::Element;
    using Query = typename Cache::Query;
    static constexpr int T = Cache::TOGETHER;
    static constexpr bool HAS_SCALES = sizeof(Element) == 1;

    const PagedAttentionParameters& p;
    const AttentionItem& item;
    const AttentionItem* const next;  // the item that this thread computes afterwards, or null
    const int64_t head;  // KV head
    const int64_t group_size, size, block_size;
    const bool reads_once;  // all packed rows fit into one tile, so every block is read once
    float* const states;  // [packed rows, D + 2]
    Query* const queries;  // [packed rows, D]
    const int64_t* const table;
    const Element* const first_key;  // those of the KV head in block 0
    const Element* const first_value;

    Attention(const PagedAttentionParameters& p, const AttentionItem& item, const AttentionItem* next, int64_t head, float* states, float* queries)
        : p(p), item(item), next(next), head(head), group_size(p.num_heads / p.cache.num_kv_heads), size(p.cache.head_dim),
          block_size(p.cache.block_size), reads_once(item.num_rows * group_size <= TILE_ROWS), states(states), queries((Query*)queries),
          table(p.block_tables + item.sequence * p.table_stride), first_key((const Element*)p.cache.keys + first_of_head(p.cache, 0, head)),
          first_value((const Element*)p.cache.values + first_of_head(p.cache, 0, head)) {}

    int64_t num_packed() const { return item.num_rows * group_size; }
    int64_t position(int64_t packed) const { return item.first_position + packed / group_size; }
    int64_t first_visible(int64_t packed) const { return ::first_visible(position(packed), p.window); }
    int64_t block_of(int64_t token) const { return table[token / block_size]; }
    int64_t block_bytes() const { return block_size * size * int64_t(sizeof(Element)); }

    // The keys and values of the token's block, and their scales.
    const Element* keys_of(int64_t token) const { return first_key + block_of(token) * p.cache.block_stride; }
    const Element* values_of(int64_t token) const { return first_value + block_of(token) * p.cache.block_stride; }
    int64_t scales_of(int64_t token) const { return first_scale_of_head(p.cache, block_of(token), head); }

    // Returns the keys that are CHUNK tokens after `token`, or those of the next item if the chunk at `start` is the last
    // one; null if there are none.
    const uint8_t* keys_after(int64_t start, int64_t token) const {
        const bool is_last = start / CHUNK + 1 == item.first_chunk + item.num_chunks;
        const AttentionItem* after = is_last ? next : &item;
        if (after == nullptr) return nullptr;
        token += is_last ? after->first_chunk * CHUNK - start : CHUNK;
        if (token >= after->first_position + after->num_rows) return nullptr;
        const int64_t block = p.block_tables[after->sequence * p.table_stride + token / block_size];
        return (const uint8_t*)(first_key + block * p.cache.block_stride);
    }

    void start() {
        for (int64_t i = 0; i < num_packed(); i++) {
            int64_t row = item.first_row + i / group_size, query_head = head * group_size + i % group_size;
            Cache::write_query(p.q + row * p.q_stride + query_head * size, size, queries + i * size);
            float* state = states + i * (size + 2);
            memset(state, 0, size_t(size + 2) * 4);
            state[size] = -INFINITY;
        }
    }

    void run() {
        start();
        for (int64_t c = item.first_chunk; c < item.first_chunk + item.num_chunks; c++)
            add_chunk<TILE_ROWS>(c * CHUNK, 0);
    }

    template <int ROWS>
    void add_chunk(int64_t start, int64_t packed) {
        for (; packed + ROWS <= num_packed(); packed += ROWS) add_tile<ROWS>(start, packed);
        if constexpr (ROWS > 1) {
            if (packed < num_packed()) add_chunk<ROWS - 1>(start, packed);
        }
    }

    // Computes ROWS packed rows over the keys and values of one chunk.
    template <int ROWS>
    void add_tile(int64_t start, int64_t packed) {
        const int64_t end = min_of(start + CHUNK, position(packed + ROWS - 1) + 1);
        const int64_t begin = max_of(start, first_visible(packed)) / LANES * LANES;
        if (begin >= end) return;
        float scores[ROWS][CHUNK];
        Query weights[ROWS][CHUNK];
        for (int64_t token = begin; token < end;) token = add_scores<ROWS>(token, end, packed, &scores[0][token - start]);
        float highest[ROWS], sums[ROWS];
        for (int r = 0; r < ROWS; r++)
            sums[r] = softmax(start, begin, end, packed + r, scores[r], weights[r], highest[r]);
        float values[ROWS][MAX_HEAD_DIM + 2];
        for (int64_t d = 0; d < size;) d = add_values<ROWS>(start, begin, end, weights, d, values);
        for (int r = 0; r < ROWS; r++) {
            values[r][size] = highest[r];
            values[r][size + 1] = sums[r];
            merge(values[r], size, states + (packed + r) * (size + 2));
        }
    }

    // Computes the scores of one or two vectors of tokens of one block. Returns the token after them.
    template <int ROWS>
    int64_t add_scores(int64_t token, int64_t end, int64_t packed, float* scores) const {
        const bool two = token + LANES < end && token % block_size + LANES < block_size;
        const Element* keys = keys_of(token) + token % block_size * T;
        const float* scales = HAS_SCALES ? p.cache.key_scales + scales_of(token) + token % block_size : nullptr;
        const uint8_t* ahead = nullptr;
        if (reads_once && token % block_size == 0) ahead = (const uint8_t*)values_of(token);
        if (two) multiply_keys<ROWS, 2>(keys, queries + packed * size, scales, ahead, scores);
        else multiply_keys<ROWS, 1>(keys, queries + packed * size, scales, ahead, scores);
        return token + (two ? 2 : 1) * LANES;
    }

    // Computes the scores, and prefetches the block at `ahead`, which will be read next.
    template <int ROWS, int VECTORS>
    void multiply_keys(const Element* keys, const Query* q, const float* scales, const uint8_t* ahead, float* scores) const {
        const int64_t step_bytes = block_size * T * int64_t(sizeof(Element));
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] = zero();
        for (int64_t d = 0; d < size; d += T) {
            if (ahead)
                for (int64_t line = 0; line < step_bytes; line += 64) prefetch_to_l2(ahead + d / T * step_bytes + line);
            typename Cache::Vector key[VECTORS];
            for (int v = 0; v < VECTORS; v++) key[v] = Cache::load_vector(keys + d * block_size + v * LANES * T);
            for (int r = 0; r < ROWS; r++) {
                const typename Cache::Vector x = Cache::broadcast(q + r * size + d);
                for (int v = 0; v < VECTORS; v++) sums[r][v] = Cache::add(sums[r][v], key[v], x);
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++)
                store(scores + r * CHUNK + v * LANES, HAS_SCALES ? sums[r][v] * load(scales + v * LANES) : sums[r][v]);
    }

    // Computes the weights of one packed row for the tokens begin..end. Returns their sum.
    NOT_INLINE float softmax(int64_t start, int64_t begin, int64_t end, int64_t packed, float* scores, Query* weights, float& highest) const {
        const int64_t rounded_end = divide_up(end, LANES) * LANES;
        // Windows of later rows may begin after this chunk.
        const int64_t first = min_of(max_of(begin, first_visible(packed)), rounded_end);
        const int64_t last = min_of(end, position(packed) + 1);
        for (int64_t t = begin; t < first; t++) scores[t - start] = -INFINITY;
        for (int64_t t = max_of(last, begin); t < rounded_end; t++) scores[t - start] = -INFINITY;
        if (p.softcap != 0) cap_scores(scores + begin - start, rounded_end - begin);
        Floats top = fill(-INFINITY);
        for (int64_t t = begin; t < rounded_end; t += LANES) top = maximum(load(scores + t - start), top);
        // Capped scores are scaled already; others are scaled here.
        const float scale = p.softcap != 0 ? 1.0f : float(p.scale);
        highest = max_of_lanes(top) * scale;
        const Floats unit = fill(scale * Cache::UNIT), pivot = fill(highest > -INFINITY ? -highest * Cache::UNIT : 0.0f);
        Floats sum = zero();
        for (int64_t t = begin; t < rounded_end; t += LANES) {
            Floats x = multiply_add(load(scores + t - start), unit, pivot);
            sum = sum + Cache::write_weight(x, weights + t - start);
        }
        return sum_of_lanes(sum);
    }

    void cap_scores(float* scores, int64_t num_scores) const {
        const Floats cap = fill(float(p.softcap)), scale = fill(float(p.scale / p.softcap));
        for (int64_t t = 0; t < num_scores; t += LANES) {
            Floats x = load(scores + t);
            store(scores + t, where_less(fill(-INFINITY), x, cap * tanh_of(x * scale), x));
        }
    }

    // Computes the weighted values of a few vectors of dimensions from `d` on. Returns the dimension after them.
    template <int ROWS>
    int64_t add_values(int64_t start, int64_t begin, int64_t end, Query (&weights)[ROWS][CHUNK], int64_t d, float (&values)[ROWS][MAX_HEAD_DIM + 2]) const {
        constexpr int VECTORS = value_vectors(ROWS);
        if (size - d >= VECTORS * LANES) return multiply_values<ROWS, VECTORS>(start, begin, end, weights, d, values);
        return multiply_values<ROWS, 1>(start, begin, end, weights, d, values);
    }

    template <int ROWS, int VECTORS>
    int64_t multiply_values(int64_t start, int64_t begin, int64_t end, Query (&weights)[ROWS][CHUNK], int64_t d, float (&values)[ROWS][MAX_HEAD_DIM + 2]) const {
        Floats sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) sums[r][v] = zero();
        for (int64_t token = begin; token < end;) {
            const int64_t offset = token % block_size, block_end = min_of(end, token - offset + block_size);
            const Element* block = values_of(token) + d * T;
            const float* scales = HAS_SCALES ? p.cache.value_scales + scales_of(token) : nullptr;
            const uint8_t* ahead = nullptr;
            if (reads_once && d == 0) ahead = keys_after(start, token);
            const int64_t step_bytes = block_bytes() / block_size * T;
            for (; token < block_end; token += T) {
                if (ahead)
                    for (int64_t line = 0; line < step_bytes; line += 64)
                        prefetch_to_l2(ahead + token % block_size / T * step_bytes + line);
                const Element* value = block + token % block_size / T * T * size;
                typename Cache::Vector vectors[VECTORS];
                for (int v = 0; v < VECTORS; v++) vectors[v] = Cache::load_vector(value + v * LANES * T);
                if (T == 2 && token + 1 == end)  // the second of the pair may hold garbage
                    for (int v = 0; v < VECTORS; v++) vectors[v] = Cache::without_second(vectors[v]);
                for (int r = 0; r < ROWS; r++) {
                    typename Cache::Vector weight = Cache::broadcast(&weights[r][token - start]);
                    if constexpr (HAS_SCALES) weight.v = weight.v * fill(scales[token % block_size]);
                    for (int v = 0; v < VECTORS; v++) sums[r][v] = Cache::add(sums[r][v], vectors[v], weight);
                }
            }
        }
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < VECTORS; v++) store(&values[r][d + v * LANES], sums[r][v]);
        return d + VECTORS * LANES;
    }

    // Merges the result of one chunk into the running softmax. The sum is 0 without weights; a NaN stays NaN.
    static NOT_INLINE void merge(const float* chunk, int64_t size, float* state) {
        if (chunk[size + 1] == 0) return;
        if (state[size + 1] == 0) {
            memcpy(state, chunk, size_t(size + 2) * 4);
            return;
        }
        const float new_score = chunk[size], old_score = state[size];
        const float top = new_score > old_score ? new_score : old_score;
        const Floats shrink_old = exponential(fill(old_score - top)), shrink_new = exponential(fill(new_score - top));
        for (int64_t d = 0; d < size; d += LANES) {
            const int64_t n = min_of(LANES, size - d);
            store_some(state + d, multiply_add(load_some(chunk + d, n), shrink_new, load_some(state + d, n) * shrink_old), n);
        }
        float sums[LANES];
        store(sums, multiply_add(fill(chunk[size + 1]), shrink_new, fill(state[size + 1]) * shrink_old));
        state[size] = top;
        state[size + 1] = sums[0];
    }
};

inline void write_attention(const PagedAttentionParameters& p, const AttentionItem& item, int64_t head, const float* states) {
    const int64_t group_size = p.num_heads / p.cache.num_kv_heads, size = p.cache.head_dim;
    for (int64_t i = 0; i < item.num_rows * group_size; i++) {
        const float* state = states + i * (size + 2);
        const int64_t row = item.first_row + i / group_size, query_head = head * group_size + i % group_size, first = query_head * size;
        float prepared_only[MAX_HEAD_DIM];
        float* out = p.output ? p.output + row * p.output_stride + first : prepared_only;
        Floats sum = fill(state[size + 1]);
        if (p.sinks) sum = sum + exponential(fill(p.sinks[query_head] - state[size]));
        for (int64_t d = 0; d < size; d += LANES) store(out + d, load(state + d) / sum);
        write_prepared(p.prepared, *p.num_rows, row, first, out, size);
    }
}

template <class Kernel>
void attend(const PagedAttentionParameters& p, const Worker& worker) {
    const AttentionPlan& plan = *p.plan;
    const int64_t num_kv_heads = p.cache.num_kv_heads, group_size = p.num_heads / num_kv_heads, size = p.cache.head_dim;
    const int64_t num_packed = rows_of_item(group_size) * group_size, state_floats = num_packed * (size + 2);
    float* scratch = plan.scratch + worker.index * plan.scratch_stride;
    // Head by head, so that an item reads near the one before it.
    Tasks tasks(worker, plan.num_items, 1, num_kv_heads);
    while (tasks.next())
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t head = tasks.round(task);
            const AttentionItem& item = plan.items[tasks.task(task)];
            const AttentionItem* next = tasks.is_last_of_round(task) ? nullptr : &item + 1;
            float* states = item.partial < 0 ? scratch : plan.partials + (item.partial * num_kv_heads + head) * state_floats;
            Kernel(p, item, next, head, states, scratch + state_floats).run();
            if (item.partial < 0) write_attention(p, item, head, states);
        }
    if (plan.num_merges == 0) return;
    barrier(worker);
    for (Tasks merges(worker, plan.num_merges * num_kv_heads, 1); merges.next();) {
        const AttentionMerge& merge = plan.merges[merges.first / num_kv_heads];
        const AttentionItem& item = plan.items[merge.first_item];
        const int64_t head = merges.first % num_kv_heads;
        float* states = plan.partials + (item.partial * num_kv_heads + head) * state_floats;
        for (int64_t c = 1; c < merge.num_chunks; c++)
            for (int64_t i = 0; i < item.num_rows * group_size; i++) {
                const int64_t offset = i * (size + 2);
                Kernel::merge(states + c * num_kv_heads * state_floats + offset, size, states + offset);
            }
        write_attention(p, item, head, states);
    }
}

inline void paged_attention(const void* parameters, const Worker& worker) {
    const PagedAttentionParameters& p = *(const PagedAttentionParameters*)parameters;
    if (p.cache.type == CACHE_BFLOAT16) attend<Attention<BFloat16Cache>>(p, worker);
    else if (p.cache.type == CACHE_INT8) attend<Attention<PlainCache<int8_t>>>(p, worker);
    else attend<Attention<PlainCache<float>>>(p, worker);
}

}  // namespace
