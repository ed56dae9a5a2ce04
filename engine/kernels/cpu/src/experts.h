// Mixture of experts (Shazeer et al. 2017): the router's choice, and matrix products with rows grouped by expert.
//
// A pair is a row and one of its experts. Pairs are sorted by expert, so that the rows of an expert are adjacent and only
// the weights of chosen experts are read; those of generated tokens come before those of prompts. What a row gets depends
// on that row alone: its products are those of `linear`, and its experts are added up in the order of their scores.
#pragma once

#include <math.h>

#include "linear.h"

namespace {

enum RouterScoring : int64_t { SOFTMAX = 0, SIGMOID = 1 };  // SCORINGS of experts.py

constexpr int64_t MAX_EXPERTS = 1024;  // of experts.py

// Replaces the logits by scores. Returns nothing that depends on other rows.
inline void score_experts(const RouteParameters& p, const float* logits, float* scores) {
    Floats top = fill(-INFINITY);
    for (int64_t e = 0; e < p.num_experts; e++) top = maximum(fill(logits[e]), top);
    const float highest = p.scoring == SOFTMAX ? max_of_lanes(top) : 0.0f;
    float sum = 0;
    for (int64_t e = 0; e < p.num_experts; e += LANES) {
        const int64_t n = min_of(LANES, p.num_experts - e);
        const Floats x = load_some(logits + e, n);
        const Floats score = p.scoring == SOFTMAX ? exponential(x - fill(highest)) : fill(1.0f) / (fill(1.0f) + exponential(zero() - x));
        store_some(scores + e, score, n);
    }
    for (int64_t e = 0; e < p.num_experts; e++) sum += scores[e];
    for (int64_t e = 0; e < p.num_experts && p.scoring == SOFTMAX; e++) scores[e] /= sum;
}

// Returns the highest number that is not marked as taken, the lowest index among equals. NaN is never the highest.
inline int64_t highest_of(const float* numbers, int64_t count, const bool* is_taken) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; i++)
        if (!is_taken[i] && (best < 0 || numbers[i] > numbers[best] || isnan(numbers[best]))) best = i;
    return best;
}

// Marks the experts of groups that are not among the best as taken.
inline void leave_best_groups(const RouteParameters& p, const float* choice, bool* is_taken) {
    if (p.num_groups == 1) return;
    float group_scores[MAX_EXPERTS];
    bool is_best[MAX_EXPERTS] = {};
    const int64_t size = p.num_experts / p.num_groups;
    for (int64_t g = 0; g < p.num_groups; g++) {
        bool is_counted[MAX_EXPERTS] = {};
        group_scores[g] = 0;
        for (int64_t i = 0; i < p.group_scores; i++) {
            const int64_t best = highest_of(choice + g * size, size, is_counted);
            is_counted[best] = true;
            group_scores[g] += choice[g * size + best];
        }
    }
    for (int64_t i = 0; i < p.num_best_groups; i++) is_best[highest_of(group_scores, p.num_groups, is_best)] = true;
    for (int64_t e = 0; e < p.num_experts; e++) is_taken[e] = !is_best[e / size];
}

inline void choose_experts(const RouteParameters& p, int64_t row) {
    float scores[MAX_EXPERTS], choice[MAX_EXPERTS];
    bool is_taken[MAX_EXPERTS] = {};
    score_experts(p, p.logits + row * p.logits_stride, scores);
    for (int64_t e = 0; e < p.num_experts; e++) choice[e] = p.bias ? scores[e] + p.bias[e] : scores[e];
    leave_best_groups(p, choice, is_taken);
    int64_t* experts = p.routing->experts + row * p.num_chosen;
    float* weights = p.routing->weights + row * p.num_chosen;
    float sum = 0;
    for (int64_t j = 0; j < p.num_chosen; j++) {
        experts[j] = highest_of(choice, p.num_experts, is_taken);
        is_taken[experts[j]] = true;
        weights[j] = scores[experts[j]];
        sum += weights[j];
    }
    for (int64_t j = 0; j < p.num_chosen; j++) {
        if (p.normalize) weights[j] /= sum + 1e-20f;
        weights[j] *= float(p.scale);
        if (p.expert_scales) weights[j] *= p.expert_scales[experts[j]];
    }
}

// Sorts the pairs of the rows first..last by expert, and appends a group for each expert that occurs.
inline void sort_pairs(const RouteParameters& p, int64_t first, int64_t last) {
    Routing& routing = *p.routing;
    int64_t next[MAX_EXPERTS + 1] = {};
    for (int64_t pair = first * p.num_chosen; pair < last * p.num_chosen; pair++) next[routing.experts[pair] + 1]++;
    next[0] = first * p.num_chosen;
    for (int64_t e = 0; e < p.num_experts; e++) {
        const int64_t num_rows = next[e + 1];
        if (num_rows > 0) routing.groups[routing.num_groups++] = {e, next[e], num_rows};
        next[e + 1] += next[e];
    }
    for (int64_t pair = first * p.num_chosen; pair < last * p.num_chosen; pair++) {
        const int64_t place = next[routing.experts[pair]]++;
        routing.rows[place] = pair / p.num_chosen;
        routing.places[pair] = place;
    }
}

inline void route(const void* parameters, const Worker& worker) {
    const RouteParameters& p = *(const RouteParameters*)parameters;
    const RowCounts counts = *p.num_rows;
    for (Tasks tasks(worker, counts.all, grain_of(worker, counts.all)); tasks.next();)
        for (int64_t row = tasks.first; row < tasks.last; row++) choose_experts(p, row);
    barrier(worker);
    if (worker.index != 0) return;
    Routing& routing = *p.routing;
    routing.num_groups = 0;
    sort_pairs(p, 0, counts.generated);
    routing.num_generated_groups = routing.num_groups;
    sort_pairs(p, counts.generated, counts.all);
    routing.num_pairs = {counts.all * p.num_chosen, counts.generated * p.num_chosen};
}

// Copies the input row of each pair to its place.
inline void gather_pairs(const void* parameters, const Worker& worker) {
    const GatherPairsParameters& p = *(const GatherPairsParameters*)parameters;
    const int64_t num_pairs = p.routing->num_pairs.all;
    for (Tasks tasks(worker, num_pairs, grain_of(worker, num_pairs)); tasks.next();)
        for (int64_t pair = tasks.first; pair < tasks.last; pair++)
            memcpy(p.output + pair * p.stride, p.input + p.routing->rows[pair] * p.stride, size_t(p.stride));
}

// Computes the products of the groups first..last, whose tasks are panels of weights.
template <class Format, class Products>
void multiply_groups(const ExpertLinearParameters& p, const Worker& worker, int64_t first, int64_t last) {
    const int64_t num_panels = divide_up(p.linear.num_outputs, PANEL), panel_bytes = Format::panel_bytes(p.linear.num_inputs);
    const int64_t num_tasks = (last - first) * num_panels, target_tasks = TASKS_OF_A_THREAD * num_threads(worker);
    for (Tasks tasks(worker, num_tasks, max_of(1, num_tasks / target_tasks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last;) {
            const ExpertRows& group = p.routing->groups[first + task / num_panels];
            LinearParameters linear = p.linear;
            linear.input += group.first * linear.input_stride;
            linear.output += group.first * linear.output_stride;
            if (linear.bias) linear.bias += group.expert * p.bias_stride;
            Products products(linear);
            const int64_t end = min_of(tasks.last, (task / num_panels + 1) * num_panels);
            for (; task < end; task++) {
                const int64_t panel = task % num_panels;
                products.compute(p.weights[group.expert] + panel * panel_bytes, panel_bytes, panel * PANEL, 0, group.num_rows);
            }
        }
}

// Computes rows of generated tokens with Products and rows of prompts with PromptProducts.
template <class Format, class Products = VectorProducts<Format>, class PromptProducts = Products>
void expert_linear(const void* parameters, const Worker& worker) {
    const ExpertLinearParameters& p = *(const ExpertLinearParameters*)parameters;
    const int64_t generated = p.routing->num_generated_groups, all = p.routing->num_groups;
    multiply_groups<Format, Products>(p, worker, 0, generated);
    if (0 < generated && generated < all) barrier(worker);  // resets the counters of tasks
    multiply_groups<Format, PromptProducts>(p, worker, generated, all);
}

// A product of each head with a matrix of its own: x [T, H * K] -> [T, H * M].
template <class Format, class Products = VectorProducts<Format>>
void head_linear(const void* parameters, const Worker& worker) {
    const HeadLinearParameters& p = *(const HeadLinearParameters*)parameters;
    const int64_t num_panels = divide_up(p.linear.num_outputs, PANEL), panel_bytes = Format::panel_bytes(p.linear.num_inputs);
    const int64_t num_tasks = p.num_heads * num_panels, target_tasks = TASKS_OF_A_THREAD * num_threads(worker);
    for (Tasks tasks(worker, num_tasks, max_of(1, num_tasks / target_tasks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++) {
            const int64_t head = task / num_panels, panel = task % num_panels;
            LinearParameters linear = p.linear;
            linear.input += head * p.head_input_bytes;
            linear.output += head * p.linear.num_outputs;
            Products products(linear);
            products.compute(p.weights[head] + panel * panel_bytes, panel_bytes, panel * PANEL, 0, linear.num_rows->all);
        }
}

constexpr int64_t COMBINED_PIECE = 512;  // floats

inline void combine_piece(const CombineExpertsParameters& p, int64_t row, int64_t start) {
    const int64_t* places = p.routing->places + row * p.num_chosen;
    const float* weights = p.routing->weights + row * p.num_chosen;
    float* out = p.output + row * p.output_stride;
    for (int64_t k = start; k < min_of(p.size, start + COMBINED_PIECE); k += LANES) {
        const int64_t n = p.size - k;
        Floats sum = zero();
        for (int64_t j = 0; j < p.num_chosen; j++)
            sum = multiply_add(fill(weights[j]), load_some(p.input + places[j] * p.input_stride + k, n), sum);
        store_some(out + k, p.accumulate ? load_some(out + k, n) + sum : sum, n);
    }
}

// Adds up the results of each row's experts. Rows are cut into pieces, so that threads can share a row.
inline void combine_experts(const void* parameters, const Worker& worker) {
    const CombineExpertsParameters& p = *(const CombineExpertsParameters*)parameters;
    const int64_t num_pieces = divide_up(p.size, COMBINED_PIECE), num_tasks = p.num_rows->all * num_pieces;
    for (Tasks tasks(worker, num_tasks, grain_of(worker, num_tasks)); tasks.next();)
        for (int64_t task = tasks.first; task < tasks.last; task++)
            combine_piece(p, task / num_pieces, task % num_pieces * COMBINED_PIECE);
}

}  // namespace
