// Mixers: what layers have in place of attention, with a state of fixed size for each sequence.
//
// Rows advance a state one by one, in the order of their positions, so its bits depend neither on the chunks of a prompt
// nor on other sequences. The state before a step stays as it was, so that a step can be taken back. A state begins with
// the last inputs of the convolution and the journal, which has the rows of the last draft: those that have been accepted
// since are replayed before the next row.
#pragma once

#include "rows.h"

namespace {

constexpr int64_t MAX_DRAFTED = 8;  // rows of the journal; mixers.py has the same number
constexpr int64_t MAX_STATE_HEAD = 256, MAX_CONV_SIZE = 16;  // of config.py
constexpr int64_t PIECE_ROWS = LANES;  // rows that advance the state of a head at a time

// The rows of one sequence: those that are replayed, those whose state is kept, and drafts. A row has `width` numbers,
// the first `channels` of which are inputs of the convolution.
struct MixedRows {
    const float* input;  // of the batch
    int64_t input_stride, channels, width, num_past;  // rows before the first one that the convolution sees
    int64_t first_row, num_replayed, num_kept, num_rows;  // in the batch; ends of the three
    const float* source;  // the state before, or null for zeros
    float* target;  // and after

    MixedRows(const StateParameters& p, const StateMove& move, const float* input, int64_t stride, int64_t channels, int64_t width, int64_t conv_size)
        : input(input), input_stride(stride), channels(channels), width(width), num_past(conv_size - 1),
          first_row(move.first_row), num_replayed(move.num_replayed),
          num_kept(num_replayed + move.num_rows - move.num_drafts), num_rows(num_replayed + move.num_rows),
          source(move.source < 0 ? nullptr : p.blocks + move.source * p.block_stride),
          target(p.blocks + move.target * p.block_stride) {}

    INLINE int64_t journal_offset() const { return num_past * channels; }
    INLINE int64_t heads_offset() const { return journal_offset() + MAX_DRAFTED * width; }

    // Returns row i, from -num_past on; null for one before the first token.
    INLINE const float* row(int64_t i) const {
        if (i >= num_replayed) return input + (first_row + i - num_replayed) * input_stride;
        if (i >= 0) return source + journal_offset() + i * width;
        return source ? source + (num_past + i) * channels : nullptr;
    }

    // Calls `take(c, sums)` with the convolution of 16 channels at row i from `first + c` on, for each c up to `size`.
    // `weights` are [conv_size, channels].
    template <class Take>
    INLINE void convolve(int64_t i, int64_t first, int64_t size, const float* weights, Take take) const {
        const float *inputs[MAX_CONV_SIZE], *factors[MAX_CONV_SIZE];
        int64_t num_inputs = 0;
        for (int64_t j = 0; j <= num_past; j++)
            if (const float* x = row(i - num_past + j)) {
                inputs[num_inputs] = x + first;
                factors[num_inputs++] = weights + j * channels + first;
            }
        for (int64_t c = 0; c < size; c += LANES) {
            Floats sum = zero();
            for (int64_t j = 0; j < num_inputs; j++)
                sum = multiply_add(load_some(inputs[j] + c, size - c), load_some(factors[j] + c, size - c), sum);
            take(c, sum);
        }
    }

    // Stores some numbers of the drafted rows in the journal.
    void store_drafts(int64_t column, int64_t size) const {
        for (int64_t i = num_kept; i < num_rows; i++)
            memcpy(target + journal_offset() + (i - num_kept) * width + column, row(i) + column, size_t(size) * 4);
    }

    // Stores what later steps need of some channels.
    void store_channels(int64_t channel, int64_t size) const {
        for (int64_t j = 0; j < num_past; j++) {
            const float* x = row(num_kept - num_past + j);
            float* out = target + j * channels + channel;
            if (x) memcpy(out, x + channel, size_t(size) * 4);
            else memset(out, 0, size_t(size) * 4);
        }
        store_drafts(channel, size);
    }
};

alignas(64) const float NO_STATE[MAX_STATE_HEAD * 4 * LANES] = {};

// Advances 16 * V columns of a head's state, [num_keys, 16 * V], by one row. A state that no further row reads is
// streamed: then its old numbers are not fetched from memory first.
template <int V, bool IS_STREAMED>
NOT_INLINE void advance_columns(const float* before, float* after, int64_t num_keys, const float* key, const float* query, float decay, float strength, const float* value, float* out) {
    Floats delta[V], sum[V];
    for (int n = 0; n < V; n++) delta[n] = sum[n] = zero();
    for (int64_t i = 0; i < num_keys; i++) {
        const Floats k = fill(key[i]);
        for (int n = 0; n < V; n++) delta[n] = multiply_add(load(before + (i * V + n) * LANES), k, delta[n]);
    }
    const Floats kept = fill(decay);
    for (int n = 0; n < V; n++) delta[n] = (load(value + n * LANES) - delta[n] * kept) * fill(strength);
    for (int64_t i = 0; i < num_keys; i++) {
        const Floats k = fill(key[i]), q = fill(query[i]);
        for (int n = 0; n < V; n++) {
            const int64_t at = (i * V + n) * LANES;
            const Floats advanced = multiply_add(k, delta[n], load(before + at) * kept);
            if constexpr (IS_STREAMED) stream(after + at, advanced);
            else store(after + at, advanced);
            sum[n] = multiply_add(advanced, q, sum[n]);
        }
    }
    for (int n = 0; n < V; n++) store(out + n * LANES, sum[n]);
}

// The gated delta rule (Yang et al. 2025) of one key head and its value heads, for the rows of one sequence. The state of
// a value head is [value_size / (16 * V), key_size, 16 * V].
template <int V>
struct DeltaHead {
    const GatedDeltaNetParameters& p;
    const MixedRows rows;
    const int64_t key_head, num_values, head_size;  // value heads of the key head; numbers of the state of one
    float queries[PIECE_ROWS][MAX_STATE_HEAD], keys[PIECE_ROWS][MAX_STATE_HEAD];
    float values[PIECE_ROWS][MAX_STATE_HEAD], outputs[PIECE_ROWS][MAX_STATE_HEAD];
    float decays[PIECE_ROWS], strengths[PIECE_ROWS];

    static int64_t channels_of(const GatedDeltaNetParameters& p) {
        return 2 * p.num_key_heads * p.key_size + p.num_value_heads * p.value_size;
    }

    DeltaHead(const GatedDeltaNetParameters& p, int64_t sequence, int64_t key_head)
        : p(p),
          rows(p.states, p.states.moves[sequence], p.input, p.input_stride, channels_of(p), channels_of(p) + 2 * p.num_value_heads, p.conv_size),
          key_head(key_head), num_values(p.num_value_heads / p.num_key_heads), head_size(p.key_size * p.value_size) {}

    // The value heads of a key head follow each other, or are as many apart as there are key heads.
    int64_t value_head(int64_t i) const {
        return p.is_tiled ? key_head + i * p.num_key_heads : key_head * num_values + i;
    }
    int64_t query_channel() const { return key_head * p.key_size; }
    int64_t key_channel() const { return (p.num_key_heads + key_head) * p.key_size; }
    int64_t value_channel(int64_t head) const { return 2 * p.num_key_heads * p.key_size + head * p.value_size; }

    void run() {
        for (int64_t i = 0, end; i < rows.num_rows; i = end) {
            end = min_of(i + PIECE_ROWS, i < rows.num_kept ? rows.num_kept : rows.num_rows);
            convolve_keys(i, end);
            for (int64_t n = 0; n < num_values; n++) advance(value_head(n), i, end);
        }
        rows.store_channels(query_channel(), p.key_size);
        rows.store_channels(key_channel(), p.key_size);
        for (int64_t n = 0; n < num_values; n++) {
            const int64_t head = value_head(n);
            rows.store_channels(value_channel(head), p.value_size);
            rows.store_drafts(rows.channels + head, 1);
            rows.store_drafts(rows.channels + p.num_value_heads + head, 1);
        }
    }

    void convolve(int64_t i, int64_t channel, int64_t size, float* out) const {
        rows.convolve(i, channel, size, p.conv, [out](int64_t c, Floats sum) { store(out + c, silu(sum)); });
    }

    // Makes a unit vector of x, times a factor.
    static void normalize(float* x, int64_t size, float factor) {
        Floats squares = zero();
        for (int64_t c = 0; c < size; c += LANES) squares = multiply_add(load(x + c), load(x + c), squares);
        float root;
        _mm_store_ss(&root, _mm_sqrt_ss(_mm_set_ss(sum_of_lanes(squares) + 1e-6f)));
        const Floats scale = fill(factor / root);
        for (int64_t c = 0; c < size; c += LANES) store(x + c, load(x + c) * scale);
    }

    void convolve_keys(int64_t begin, int64_t end) {
        float root;
        _mm_store_ss(&root, _mm_sqrt_ss(_mm_set_ss(float(p.key_size))));
        for (int64_t i = begin; i < end; i++) {
            convolve(i, query_channel(), p.key_size, queries[i - begin]);
            convolve(i, key_channel(), p.key_size, keys[i - begin]);
            normalize(queries[i - begin], p.key_size, 1.0f / root);
            normalize(keys[i - begin], p.key_size, 1.0f);
        }
    }

    // What is left of the state, exp(-exp(A_log) * softplus(a + bias)), and how strongly a row writes, sigmoid(b).
    void prepare_gates(int64_t head, int64_t begin, int64_t end) {
        float steps[PIECE_ROWS] = {}, strengths_in[PIECE_ROWS] = {};
        for (int64_t i = begin; i < end; i++) {
            strengths_in[i - begin] = rows.row(i)[rows.channels + head];
            steps[i - begin] = rows.row(i)[rows.channels + p.num_value_heads + head] + p.step_bias[head];
        }
        const Floats x = load(steps), one = fill(1.0f);
        const Floats softplus = maximum(zero(), x) + logarithm(one + exponential(zero() - absolute(x)));
        store(decays, exponential(softplus * fill(-p.decay[head])));
        store(strengths, one / (one + exponential(zero() - load(strengths_in))));
    }

    void advance(int64_t head, int64_t begin, int64_t end) {
        const int64_t state = rows.heads_offset() + head * head_size;
        for (int64_t i = begin; i < end; i++) convolve(i, value_channel(head), p.value_size, values[i - begin]);
        prepare_gates(head, begin, end);
        float drafted[MAX_STATE_HEAD * V * LANES];
        for (int64_t c = 0; c < p.value_size; c += V * LANES) {
            float* const after = begin < rows.num_kept ? rows.target + state + c * p.key_size : drafted;
            const float* before = rows.target + state + c * p.key_size;
            if (begin == 0) before = rows.source ? rows.source + state + c * p.key_size : NO_STATE;
            const int64_t last = end - begin - 1;
            for (int64_t i = 0; i < last; i++, before = after)
                advance_columns<V, false>(before, after, p.key_size, keys[i], queries[i], decays[i], strengths[i], values[i] + c, outputs[i] + c);
            const auto advance_last = end == rows.num_rows && size_t(after) % 64 == 0 ? advance_columns<V, true> : advance_columns<V, false>;
            advance_last(before, after, p.key_size, keys[last], queries[last], decays[last], strengths[last], values[last] + c, outputs[last] + c);
        }
        for (int64_t i = max_of(begin, rows.num_replayed); i < end; i++) write_output(head, i, outputs[i - begin]);
    }

    // The RMS norm of a row's output, gated.
    void write_output(int64_t head, int64_t i, const float* x) const {
        const int64_t row = rows.first_row + i - rows.num_replayed;
        const float* gate = p.input + row * p.input_stride + rows.width + head * p.value_size;
        float* out = p.output + row * p.output_stride + head * p.value_size;
        const Floats scale = fill(inverse_rms(x, p.value_size, p.epsilon));
        for (int64_t c = 0; c < p.value_size; c += LANES)
            store(out + c, load(x + c) * scale * load(p.norm + c) * silu(load(gate + c)));
    }
};

template <int V>
void gated_delta_net(const GatedDeltaNetParameters& p, const Worker& worker) {
    for (Tasks tasks(worker, *p.states.num_seqs * p.num_key_heads, 1); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++)
            DeltaHead<V>(p, task / p.num_key_heads, task % p.num_key_heads).run();
}

// A layer of Qwen3-Next and Qwen 3.5 between its projections: convolution, gated delta rule, gated norm.
void gated_delta_net(const void* parameters, const Worker& worker) {
    const GatedDeltaNetParameters& p = *(const GatedDeltaNetParameters*)parameters;
    if (p.value_size % (4 * LANES) == 0) gated_delta_net<4>(p, worker);
    else gated_delta_net<1>(p, worker);
}

constexpr int64_t CONV_PIECE = 256;  // channels that a thread takes at a time

inline void convolve_piece(const ShortConvParameters& p, int64_t sequence, int64_t start) {
    const MixedRows rows(p.states, p.states.moves[sequence], p.input, p.input_stride, p.num_channels, p.num_channels, p.conv_size);
    const int64_t size = min_of(CONV_PIECE, p.num_channels - start);
    for (int64_t i = rows.num_replayed; i < rows.num_rows; i++) {
        const int64_t row = rows.first_row + i - rows.num_replayed;
        const float *gate = p.gate + row * p.gate_stride + start, *bias = p.bias ? p.bias + start : nullptr;
        float* out = p.output + row * p.output_stride + start;
        rows.convolve(i, start, size, p.conv, [=](int64_t c, Floats sum) {
            if (bias) sum = sum + load_some(bias + c, size - c);
            store_some(out + c, sum * load_some(gate + c, size - c), size - c);
        });
    }
    rows.store_channels(start, size);
}

// The short convolution of LFM 2: a causal convolution of each channel, gated.
void short_conv(const void* parameters, const Worker& worker) {
    const ShortConvParameters& p = *(const ShortConvParameters*)parameters;
    const int64_t num_pieces = divide_up(p.num_channels, CONV_PIECE);
    for (Tasks tasks(worker, *p.states.num_seqs * num_pieces, 1); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++)
            convolve_piece(p, task / num_pieces, task % num_pieces * CONV_PIECE);
}

}  // namespace
