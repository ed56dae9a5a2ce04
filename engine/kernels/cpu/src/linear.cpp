// Matrix products with plain weights, with tables of codes, and with zero points.

#include "products.h"

const lightwell::NamedFunction lightwell::LINEAR_FUNCTIONS[] = {
    {"linear_float32", linear<Float32>}, {"expert_linear_float32", expert_linear<Float32>}, {"head_linear_float32", head_linear<Float32>},
    {"linear_bfloat16", LINEAR_PAIRS<BFloat16>}, {"expert_linear_bfloat16", EXPERTS_PAIRS<BFloat16>}, {"head_linear_bfloat16", HEADS_PAIRS<BFloat16>},
    QUANTISED("iq4_nl", IQ4_NL),
    QUANTISED("iq4_xs", IQ4_XS),
    QUANTISED("mxfp4", MXFP4),
    QUANTISED("uint4", UInt4),
    QUANTISED("uint8", UInt8),
    {nullptr, nullptr},
};
