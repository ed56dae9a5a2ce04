// Functions that take little time to compile: on rows, on the rows of packed weights, and the sampler.

#include "functions.h"

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "lora.h"
#include "meet.h"
#include "mixers.h"
#include "pack.h"
#include "rope.h"
#include "rows.h"
#include "sampler.h"

const lightwell::NamedFunction lightwell::ROW_FUNCTIONS[] = {
    {"prepare", prepare},
    {"gather", gather},
    {"rms_norm", rms_norm},
    {"layer_norm", layer_norm},
    {"add", add},
    {"meet", meet},
    {"scale", scale},
    {"act_and_mul", act_and_mul},
    {"gate_rows", gate_rows},
    {"route", route},
    {"gather_pairs", gather_pairs},
    {"combine_experts", combine_experts},
    {"rope_and_store_kv", rope_and_store_kv},
    {"gated_delta_net", gated_delta_net},
    {"short_conv", short_conv},
    {"sample", sample},
    {"add_lora_float32", add_lora<float>},
    {"add_lora_bfloat16", add_lora<uint16_t>},
#define FORMAT(NAME, FORMAT, PACK) {"embed_" NAME, embed<FORMAT>}, {"pack_" NAME, PACK}
    FORMAT("float32", Float32, (pack_plain<Float32, 4>)),
    FORMAT("bfloat16", BFloat16, (pack_plain<BFloat16, 2>)),
    FORMAT("int8", Q8_0, (pack<Q8_0, FloatRow>)),
    FORMAT("q4_0", Q4_0, (pack<Q4_0, BlockQ4_0>)),
    FORMAT("q4_1", Q4_1, (pack<Q4_1, BlockQ4_1>)),
    FORMAT("q5_0", Q5_0, (pack<Q5_0, BlockQ5_0>)),
    FORMAT("q5_1", Q5_1, (pack<Q5_1, BlockQ5_1>)),
    FORMAT("q8_0", Q8_0, (pack<Q8_0, BlockQ8_0>)),
    FORMAT("q2_k", Q2_K, (pack<Q2_K, BlockQ2_K>)),
    FORMAT("q3_k", Q3_K, (pack<Q3_K, BlockQ3_K>)),
    FORMAT("q4_k", Q4_K, (pack<Q4_K, BlockQ4_K>)),
    FORMAT("q5_k", Q5_K, (pack<Q5_K, BlockQ5_K>)),
    FORMAT("q6_k", Q6_K, (pack<Q6_K, BlockQ6_K>)),
    FORMAT("iq4_nl", IQ4_NL, (pack<IQ4_NL, BlockIQ4_NL>)),
    FORMAT("iq4_xs", IQ4_XS, (pack<IQ4_XS, BlockIQ4_XS>)),
    FORMAT("mxfp4", MXFP4, (pack<MXFP4, BlockMXFP4>)),
    FORMAT("uint4", UInt4, (pack<UInt4, BlockUInt4>)),
    FORMAT("uint8", UInt8, (pack<UInt8, BlockUInt8>)),
#undef FORMAT
    {nullptr, nullptr},
};
