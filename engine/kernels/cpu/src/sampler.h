// The sampler: from logits to tokens, with the results of engine/sampling/sampler.py, which documents the settings.
//
// A row is one task, so its token depends on that row alone. A row is read in vectors a few times, and tokens that cannot
// be chosen are skipped as early as possible. Nothing is sorted: a threshold is found by splitting the candidate values
// at a pivot and keeping one side, until one value is left.
#pragma once

#include <float.h>
#include <math.h>

#include "simd.h"

namespace {

constexpr uint32_t ALL_LANES = (1u << LANES) - 1;
constexpr int64_t TOP_VECTORS = 16;  // vectors searched at once for the largest value
constexpr int64_t SUM_PIECE = 4096;  // values added up in float32; the sums of the pieces are added up in float64
constexpr float NUCLEUS_DEPTHS[] = {4.0f, 8.0f, 16.0f, INFINITY};  // below the largest value; often few tokens suffice
constexpr float HIGHEST_NOISE = 22.5f;  // -log of the smallest uniform number is 22.2

// Vectors.

inline Floats load_padded(const float* p, int64_t n) {  // -infinity after the end of the row
    if (n >= LANES) return load(p);
    float lanes[LANES];
    store(lanes, fill(-INFINITY));
    memcpy(lanes, p, size_t(n) * 4);
    return load(lanes);
}

// Writes the lanes whose bits are set to p, followed by garbage up to a whole vector. Returns the number of lanes.
inline int64_t store_chosen(float* p, Floats x, uint32_t chosen) {
#ifdef __AVX512F__
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps(__mmask16(chosen), x.v));
    return __builtin_popcount(chosen);
#else
    float lanes[LANES];
    store(lanes, x);
    int64_t num = 0;
    for (; chosen; chosen &= chosen - 1) p[num++] = lanes[__builtin_ctz(chosen)];
    return num;
#endif
}

// The largest value.

struct Top {
    float value;  // -infinity if there is no number
    int64_t id;  // the lowest with that value
    bool has_nan;
};

inline Floats maximum_of(const float* x, int64_t n, uint32_t& numbers) {
    Floats highest = fill(-INFINITY);
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats v = load_padded(x + i, n - i);
        numbers &= equal_mask(v, v);
        highest = maximum(v, highest);  // returns the second operand if the first is NaN
    }
    return highest;
}

inline int64_t find_first(const float* x, int64_t n, float value) {
    for (int64_t i = 0; i < n; i += LANES)
        if (const uint32_t found = equal_mask(load_padded(x + i, n - i), fill(value))) return i + __builtin_ctz(found);
    return 0;  // all are NaN
}

Top find_top(const float* x, int64_t n) {
    constexpr int64_t PIECE = TOP_VECTORS * LANES;
    Floats best = fill(-INFINITY);
    int64_t best_start = 0;
    uint32_t numbers = ALL_LANES;
    for (int64_t start = 0; start < n; start += PIECE) {
        const int64_t left = n - start;
        const Floats highest = left >= PIECE ? maximum_of(x + start, PIECE, numbers)  // a constant, so that the loop is unrolled
                                             : maximum_of(x + start, left, numbers);
        if (less_mask(best, highest)) {
            best = fill(max_of_lanes(highest));
            best_start = start;
        }
    }
    const float value = max_of_lanes(best);
    return {value, best_start + find_first(x + best_start, min_of(PIECE, n - best_start), value), numbers != ALL_LANES};
}

// Changes to single tokens: bias, bans and penalties.

struct Counts {
    int32_t* of_token;  // bit 0: the token occurs; higher bits: its count in the output
    int64_t vocab_size;

    bool has(int32_t id) const { return uint64_t(id) < uint64_t(vocab_size); }
};

inline float penalised(float x, int32_t count, const SampledRow& row) {
    x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
    x -= row.frequency_penalty * float(count >> 1);
    return count >> 1 ? x - row.presence_penalty : x;
}

// Counts tokens, of which the first `num_prompt_tokens` belong to the prompt.
inline void count_tokens(const int32_t* ids, int64_t num_ids, int64_t num_prompt_tokens, Counts counts) {
    for (int64_t i = 0; i < num_ids; i++)
        if (counts.has(ids[i])) {
            int32_t& count = counts.of_token[ids[i]];
            count = (count | 1) + (i < num_prompt_tokens ? 0 : 2);
        }
}

inline void penalise_tokens(const int32_t* ids, int64_t num_ids, const SampledRow& row, Counts counts, float* x) {
    for (int64_t i = 0; i < num_ids; i++)
        if (counts.has(ids[i]) && counts.of_token[ids[i]]) {
            x[ids[i]] = penalised(x[ids[i]], counts.of_token[ids[i]], row);
            counts.of_token[ids[i]] = 0;  // so that each token is penalised once, and all counts are 0 for the next row
        }
}

// Applies the repetition penalty to prompt and output (Keskar et al. 2019), OpenAI's penalties to the output.
inline void apply_penalties(const SampledRow& row, const int32_t* drafted, Counts counts, float* x) {
    count_tokens(row.history, row.num_history, row.num_prompt_tokens, counts);
    count_tokens(drafted, row.num_drafted, 0, counts);
    penalise_tokens(row.history, row.num_history, row, counts, x);
    penalise_tokens(drafted, row.num_drafted, row, counts, x);
}

// Returns whether the row has any such change.
inline bool change_tokens(const SampleParameters& p, const SampledRow& row, Counts counts, float* x) {
    const int32_t* ids = p.ids + row.first_id;
    const float* biases = p.biases + row.first_bias;
    for (int64_t i = 0; i < row.num_biased; i++)
        if (counts.has(ids[i])) x[ids[i]] += biases[i];
    ids += row.num_biased;
    for (int64_t i = 0; i < row.num_banned; i++)
        if (counts.has(ids[i])) x[ids[i]] = -INFINITY;
    apply_penalties(row, ids + row.num_banned, counts, x);
    return row.num_biased + row.num_banned + row.num_history > 0;
}

// Thresholds.

// The values that are at least as large as a pivot (above), and the others (below).
struct Split {
    double weight_above;
    float lowest_above;
    float highest_below;
};

Split split_at(const float* values, const float* weights, int64_t n, float pivot) {
    const Floats limit = fill(pivot), infinity = fill(INFINITY);
    Floats lowest = infinity, highest = zero() - infinity;
    double weight = 0;
    for (int64_t start = 0; start < n; start += SUM_PIECE) {
        const int64_t end = min_of(start + SUM_PIECE, n);
        Floats sum = zero();
        for (int64_t i = start; i < end; i += LANES) {
            const Floats v = load_padded(values + i, end - i);
            sum = sum + where_less(v, limit, zero(), load(weights + i));
            lowest = minimum(lowest, where_less(v, limit, infinity, v));
            highest = maximum(highest, where_less(v, limit, v, zero() - infinity));
        }
        weight += sum_of_lanes(sum);
    }
    return {weight, 0 - max_of_lanes(zero() - lowest), max_of_lanes(highest)};
}

// Moves one side of a split to the front. Returns the number of its values. The lower side may include -infinity from
// behind the end of the row, which never counts: it is below every pivot.
int64_t keep_side(float* values, float* weights, int64_t n, float pivot, bool is_above) {
    int64_t num = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        const Floats v = load_padded(values + i, n - i), weight = load(weights + i);
        const uint32_t below = less_mask(v, fill(pivot)), chosen = is_above ? ALL_LANES & ~below : below;
        store_chosen(weights + num, weight, chosen);
        num += store_chosen(values + num, v, chosen);
    }
    return num;
}

// Returns the largest threshold such that the weights of all values not below it add up to at least `mass`; the weights
// of all values together must. `highest` is one of the values, `lowest` no larger than any. Overwrites both arrays.
float find_threshold(float* values, float* weights, int64_t n, double mass, float lowest, float highest) {
    double above = 0;  // weight of the values larger than those left
    while (lowest < highest) {
        const float middle = 0.5f * (lowest == -INFINITY ? -FLT_MAX : lowest) + 0.5f * highest;
        const float pivot = middle > lowest ? middle : highest;
        const Split split = split_at(values, weights, n, pivot);
        const bool is_above = above + split.weight_above >= mass;
        if (is_above) {
            lowest = split.lowest_above;
        } else {
            above += split.weight_above;
            highest = split.highest_below;
        }
        n = keep_side(values, weights, n, pivot, is_above);
    }
    return lowest;
}

// Picks a token of one row: the one with the largest logit / temperature + Gumbel noise.
struct RowSampler {
    const SampledRow& row;
    float* const x;
    const int64_t size;
    float highest;  // of x
    float* const values;
    float* const weights;

    int64_t run() {
        scale();
        float lowest = -INFINITY;  // of the tokens kept
        if (row.min_p > 0) lowest = highest + max_of_lanes(logarithm(fill(row.min_p)));
        if (row.top_k > 0 && row.top_k < size) lowest = keep_top_k(lowest);
        if (row.top_p < 1) lowest = keep_top_p(lowest);
        return draw(lowest);
    }

    void scale() {
        if (row.temperature == 1) return;
        const Floats temperature = fill(row.temperature);
        for (int64_t i = 0; i < size; i += LANES) {
            const int64_t n = min_of(LANES, size - i);
            store_some(x + i, load_some(x + i, n) / temperature, n);
        }
        highest /= row.temperature;
    }

    // Copies the values that are at least `lowest` to `values`. If that is -infinity, padding behind the row is included.
    int64_t collect(float lowest) {
        int64_t num = 0;
        for (int64_t i = 0; i < size; i += LANES) {
            const Floats v = load_padded(x + i, size - i);
            const uint32_t chosen = ALL_LANES & ~less_mask(v, fill(lowest));
            if (chosen) num += store_chosen(values + num, v, chosen);
        }
        return num;
    }

    // Returns a lower bound of the k-th largest value: the k-th largest of the maxima that each lane has over TOP_VECTORS
    // vectors.
    float limit_of_top_k() {
        constexpr int64_t PIECE = TOP_VECTORS * LANES;
        const int64_t num = divide_up(size, PIECE) * LANES;
        if (row.top_k > num) return -INFINITY;
        uint32_t numbers = 0;
        for (int64_t i = 0; i * PIECE < size; i++)
            store(values + i * LANES, maximum_of(x + i * PIECE, min_of(PIECE, size - i * PIECE), numbers));
        return kth_largest(num, -INFINITY);
    }

    float kth_largest(int64_t num, float lowest) {
        for (int64_t i = 0; i < num; i += LANES) store(weights + i, fill(1.0f));
        return find_threshold(values, weights, num, double(row.top_k), lowest, highest);
    }

    float keep_top_k(float lowest) {
        const float limit = limit_of_top_k(), from = limit < lowest ? lowest : limit;
        const int64_t num = collect(from);
        return num < row.top_k ? lowest : kth_largest(num, from);
    }

    // Keeps the smallest set of most likely tokens with probability top_p (Holtzman et al. 2020).
    float keep_top_p(float lowest) {
        const double mass = double(row.top_p) * sum_of_exponentials(lowest);
        for (const float depth : NUCLEUS_DEPTHS) {
            const float limit = highest - depth, from = limit < lowest ? lowest : limit;
            const int64_t num = collect(from);
            if (weigh(num) >= mass) return find_threshold(values, weights, num, mass, from, highest);
            if (limit < lowest) break;
        }
        return lowest;  // rounding can make all tokens necessary
    }

    double weigh(int64_t num) {  // sets the weights of `values` and returns their sum
        double total = 0;
        for (int64_t start = 0; start < num; start += SUM_PIECE) {
            const int64_t end = min_of(start + SUM_PIECE, num);
            Floats sum = zero();
            for (int64_t i = start; i < end; i += LANES) {
                const Floats weight = exponential(load_padded(values + i, end - i) - fill(highest));
                store(weights + i, weight);
                sum = sum + weight;
            }
            total += sum_of_lanes(sum);
        }
        return total;
    }

    double sum_of_exponentials(float lowest) const {
        const Floats limit = fill(lowest), pivot = fill(highest);
        double total = 0;
        for (int64_t start = 0; start < size; start += SUM_PIECE) {
            const int64_t end = min_of(start + SUM_PIECE, size);
            Floats sum = zero();
            for (int64_t i = start; i < end; i += LANES) {
                const Floats v = load_padded(x + i, end - i);
                if (less_mask(v, limit) == ALL_LANES) continue;
                sum = sum + where_less(v, limit, zero(), exponential(v - pivot));
            }
            total += sum_of_lanes(sum);
        }
        return total;
    }

    int64_t draw(float lowest) const;
};

// Random numbers.

struct RngKeys {
    uint32_t first;
    uint32_t second;
};

inline RngKeys rng_keys(uint64_t seed, uint64_t position) {  // finaliser of SplitMix64 (Steele et al. 2014)
    uint64_t key = seed + (position + 1) * 0x9e3779b97f4a7c15;
    key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9;
    key = (key ^ key >> 27) * 0x94d049bb133111eb;
    key ^= key >> 31;
    return {uint32_t(key), uint32_t(key >> 32)};
}

inline Ints mix(Ints x) {  // finaliser of MurmurHash3
    x = (x ^ shift_right<16>(x)) * fill_ints(int32_t(0x85ebca6b));
    x = (x ^ shift_right<13>(x)) * fill_ints(int32_t(0xc2b2ae35));
    return x ^ shift_right<16>(x);
}

// Uniform numbers for 16 tokens from `id` on, between 2^-32 and 1 - 2^-24.
inline Floats uniform(RngKeys keys, int64_t id) {
    alignas(64) static constexpr int32_t LANE_IDS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints ids = load_ints(LANE_IDS) + fill_ints(int32_t(id));
    const Ints hashed = ids * fill_ints(int32_t(0x9e3779b1));
    const Ints bits = mix(mix(hashed ^ fill_ints(int32_t(keys.first))) ^ fill_ints(int32_t(keys.second)));
    const Floats number = (to_floats(bits & fill_ints(0x7fffffff)) + fill(0.5f)) * fill(0x1p-31f);
    return minimum(number, fill(1 - 0x1p-24f));
}

inline Floats gumbel(Floats u) {  // -log(-log(1 - u))
    const Floats rest = fill(1.0f) - u;
    const Floats lost = (fill(1.0f) - rest) - u;  // by rounding, which loses most of a small u
    return zero() - logarithm(zero() - (logarithm(rest) + lost));
}

// Upper bound of `gumbel`: -log(u) is larger, and larger still with the exponent of u instead of its logarithm.
inline Floats bound_of_gumbel(Floats u) {
    return to_floats(shift_right<23>(as_ints(u)) + fill_ints(-127)) * fill(-0.6932f);
}

// Most tokens cannot win even with the highest noise, or not with the bound of their noise. Gumbel noise, which costs
// most, is computed only for the others.
int64_t RowSampler::draw(float lowest) const {
    const RngKeys keys = rng_keys(row.seed, uint64_t(row.position));
    const Floats limit = fill(lowest);
    Floats best = fill(-INFINITY), needed = limit;
    int64_t id = 0;
    for (int64_t i = 0; i < size; i += LANES) {
        const Floats v = load_padded(x + i, size - i);
        if (less_mask(v, needed) == ALL_LANES) continue;
        const Floats u = uniform(keys, i);
        if (less_mask(v + bound_of_gumbel(u), best) == ALL_LANES) continue;
        const Floats score = where_less(v, limit, fill(-INFINITY), v + gumbel(u));
        if (!less_mask(best, score)) continue;
        best = fill(max_of_lanes(score));
        id = i + __builtin_ctz(equal_mask(score, best));
        needed = maximum(limit, best - fill(HIGHEST_NOISE));
    }
    return id;
}

inline void keep_allowed(const uint8_t* allowed, int64_t size, float* x) {
    for (int64_t i = 0; i < size; i += 8) {
        const uint8_t bits = allowed[i / 8];
        if (bits == 0xff) continue;
        if (bits == 0 && size - i >= 8) {
            for (int64_t j = 0; j < 8; j++) x[i + j] = -INFINITY;
            continue;
        }
        for (int64_t j = 0; j < 8 && i + j < size; j++)
            if (!(bits >> j & 1)) x[i + j] = -INFINITY;
    }
}

void sample(const void* parameters, const Worker& worker) {
    const SampleParameters& p = *(const SampleParameters*)parameters;
    const int64_t num_values = (divide_up(p.vocab_size, LANES) + 2) * LANES;
    float* values = (float*)(p.scratch + worker.index * p.scratch_stride);
    const Counts counts{(int32_t*)(values + 2 * num_values), p.vocab_size};
    for (Tasks tasks(worker, p.num_rows, 1); tasks.next();) {
        const int64_t r = tasks.first;
        const SampledRow& row = p.rows[r];
        float* x = p.logits + r * p.logits_stride;
        if (row.allowed != nullptr) keep_allowed(row.allowed, p.vocab_size, x);
        Top top = find_top(x, p.vocab_size);
        p.is_finite[r] = !top.has_nan && isfinite(top.value);
        if (p.is_finite[r] && change_tokens(p, row, counts, x)) top = find_top(x, p.vocab_size);
        const bool can_sample = p.is_finite[r] && isfinite(top.value);  // unless all tokens are banned
        if (row.temperature > 0 && can_sample)
            top.id = RowSampler{row, x, p.vocab_size, top.value, values, values + num_values}.run();
        p.token_ids[r] = top.id;
    }
}

}  // namespace
