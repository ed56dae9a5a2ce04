// Matrix products for each format of weights.

#include "functions.h"

#include "experts.h"
#include "linear.h"
#ifdef LIGHTWELL_TILES
#include "tile_linear.h"
#endif

namespace {

#ifdef LIGHTWELL_TILES
constexpr lightwell::Function LINEAR_BFLOAT16 = linear<BFloat16, TileProducts<BFloat16>>;
template <class Format>
constexpr lightwell::Function LINEAR_QUANTISED = linear_by_origin<Format, VectorProducts<Format>, TileProducts<Format>>;
constexpr lightwell::Function EXPERTS_BFLOAT16 = expert_linear<BFloat16, TileProducts<BFloat16>>;
constexpr lightwell::Function HEADS_BFLOAT16 = head_linear<BFloat16, TileProducts<BFloat16>>;
template <class Format>
constexpr lightwell::Function EXPERTS_QUANTISED = expert_linear<Format, VectorProducts<Format>, TileProducts<Format>>;
#else
constexpr lightwell::Function LINEAR_BFLOAT16 = linear<BFloat16>;
template <class Format>
constexpr lightwell::Function LINEAR_QUANTISED = linear<Format>;
constexpr lightwell::Function EXPERTS_BFLOAT16 = expert_linear<BFloat16>;
constexpr lightwell::Function HEADS_BFLOAT16 = head_linear<BFloat16>;
template <class Format>
constexpr lightwell::Function EXPERTS_QUANTISED = expert_linear<Format>;
#endif

}  // namespace

const lightwell::NamedFunction lightwell::LINEAR_FUNCTIONS[] = {
    {"linear_float32", linear<Float32>}, {"expert_linear_float32", expert_linear<Float32>}, {"head_linear_float32", head_linear<Float32>},
    {"linear_bfloat16", LINEAR_BFLOAT16}, {"expert_linear_bfloat16", EXPERTS_BFLOAT16}, {"head_linear_bfloat16", HEADS_BFLOAT16},
#define QUANTISED(NAME, FORMAT) {"linear_" NAME, LINEAR_QUANTISED<FORMAT>}, {"expert_linear_" NAME, EXPERTS_QUANTISED<FORMAT>}
    QUANTISED("int8", Q8_0),
    QUANTISED("q4_0", Q4_0),
    QUANTISED("q4_1", Q4_1),
    QUANTISED("q5_0", Q5_0),
    QUANTISED("q5_1", Q5_1),
    QUANTISED("q8_0", Q8_0),
    QUANTISED("q2_k", Q2_K),
    QUANTISED("q3_k", Q3_K),
    QUANTISED("q4_k", Q4_K),
    QUANTISED("q5_k", Q5_K),
    QUANTISED("q6_k", Q6_K),
    QUANTISED("iq4_nl", IQ4_NL),
    QUANTISED("iq4_xs", IQ4_XS),
    QUANTISED("mxfp4", MXFP4),
    QUANTISED("uint4", UInt4),
    QUANTISED("uint8", UInt8),
#undef QUANTISED
    {nullptr, nullptr},
};
