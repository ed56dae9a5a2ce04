// Matrix products for each format of weights.

#include "functions.h"

#include "linear.h"
#ifdef LIGHTWELL_TILES
#include "tile_linear.h"
#endif

namespace {

#ifdef LIGHTWELL_TILES
constexpr lightwell::Function LINEAR_BFLOAT16 = linear<BFloat16, TileProducts<BFloat16>>;
template <class Format>
constexpr lightwell::Function LINEAR_QUANTISED = linear_by_origin<Format, VectorProducts<Format>, TileProducts<Format>>;
#else
constexpr lightwell::Function LINEAR_BFLOAT16 = linear<BFloat16>;
template <class Format>
constexpr lightwell::Function LINEAR_QUANTISED = linear<Format>;
#endif

}  // namespace

const lightwell::NamedFunction lightwell::LINEAR_FUNCTIONS[] = {
    {"linear_float32", linear<Float32>},
    {"linear_bfloat16", LINEAR_BFLOAT16},
    {"linear_int8", LINEAR_QUANTISED<Q8_0>},
    {"linear_q4_0", LINEAR_QUANTISED<Q4_0>},
    {"linear_q4_1", LINEAR_QUANTISED<Q4_1>},
    {"linear_q5_0", LINEAR_QUANTISED<Q5_0>},
    {"linear_q5_1", LINEAR_QUANTISED<Q5_1>},
    {"linear_q8_0", LINEAR_QUANTISED<Q8_0>},
    {"linear_q2_k", LINEAR_QUANTISED<Q2_K>},
    {"linear_q3_k", LINEAR_QUANTISED<Q3_K>},
    {"linear_q4_k", LINEAR_QUANTISED<Q4_K>},
    {"linear_q5_k", LINEAR_QUANTISED<Q5_K>},
    {"linear_q6_k", LINEAR_QUANTISED<Q6_K>},
    {"linear_iq4_nl", LINEAR_QUANTISED<IQ4_NL>},
    {"linear_iq4_xs", LINEAR_QUANTISED<IQ4_XS>},
    {"linear_mxfp4", LINEAR_QUANTISED<MXFP4>},
    {"linear_uint4", LINEAR_QUANTISED<UInt4>},
    {"linear_uint8", LINEAR_QUANTISED<UInt8>},
    {nullptr, nullptr},
};
