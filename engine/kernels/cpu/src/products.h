// The functions of matrix products, for each format of weights. Formats are spread over several sources, which are
// compiled at the same time.
#pragma once

#include "functions.h"

#include "experts.h"
#include "linear.h"
#ifdef LIGHTWELL_TILES
#include "tile_linear.h"
#endif

namespace {

// Of bfloat16, and of formats that are multiplied as integers.
#ifdef LIGHTWELL_TILES
template <class Format>
constexpr lightwell::Function LINEAR_PAIRS = linear<Format, TileProducts<Format>>;
template <class Format>
constexpr lightwell::Function EXPERTS_PAIRS = expert_linear<Format, TileProducts<Format>>;
template <class Format>
constexpr lightwell::Function HEADS_PAIRS = head_linear<Format, TileProducts<Format>>;
template <class Format>
constexpr lightwell::Function LINEAR_QUANTISED = linear_by_origin<Format, VectorProducts<Format>, TileProducts<Format>>;
template <class Format>
constexpr lightwell::Function EXPERTS_QUANTISED = expert_linear<Format, VectorProducts<Format>, TileProducts<Format>>;
#else
template <class Format>
constexpr lightwell::Function LINEAR_PAIRS = linear<Format>;
template <class Format>
constexpr lightwell::Function EXPERTS_PAIRS = expert_linear<Format>;
template <class Format>
constexpr lightwell::Function HEADS_PAIRS = head_linear<Format>;
template <class Format>
constexpr lightwell::Function LINEAR_QUANTISED = linear<Format>;
template <class Format>
constexpr lightwell::Function EXPERTS_QUANTISED = expert_linear<Format>;
#endif

}  // namespace

#define QUANTISED(NAME, FORMAT) {"linear_" NAME, LINEAR_QUANTISED<FORMAT>}, {"expert_linear_" NAME, EXPERTS_QUANTISED<FORMAT>}
