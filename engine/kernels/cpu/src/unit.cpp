// All functions of a program, compiled for the code path that LIGHTWELL_ISA names (see build.py).

#include "team.h"

using lightwell::barrier;
using lightwell::num_threads;
using lightwell::Tasks;
using lightwell::Worker;

#include "attention.h"
#include "linear.h"
#include "lora.h"
#include "pack.h"
#include "rows.h"
#include "sampler.h"
#ifdef __AVX512BF16__
#include "tile_attention.h"
#include "tile_linear.h"
#endif

#include "functions.h"
#include "layouts.h"

namespace {

constexpr lightwell::NamedFunction FUNCTIONS[] = {
    {"prepare", prepare},
    {"gather", gather},
    {"rms_norm", rms_norm},
    {"act_and_mul", act_and_mul},
    {"rope_and_store_kv", rope_and_store_kv},
    {"plan_attention", plan_attention},
    {"paged_attention", paged_attention},
    {"sample", sample},
    {"add_lora_float32", add_lora<float>},
    {"add_lora_bfloat16", add_lora<uint16_t>},
#define FORMAT(NAME, FORMAT, PACK) {"linear_" NAME, linear<FORMAT>}, {"embed_" NAME, embed<FORMAT>}, {"pack_" NAME, PACK}
    FORMAT("float32", Float32, (pack_plain<Float32, 4>)),
    FORMAT("bfloat16", BFloat16, (pack_plain<BFloat16, 2>)),
    FORMAT("int8", Q8_0, (pack<Q8_0, FloatRow>)),
    FORMAT("q4_0", Q4_0, (pack<Q4_0, BlockQ4_0>)),
    FORMAT("q4_1", Q4_1, (pack<Q4_1, BlockQ4_1>)),
    FORMAT("q5_0", Q5_0, (pack<Q5_0, BlockQ5_0>)),
    FORMAT("q5_1", Q5_1, (pack<Q5_1, BlockQ5_1>)),
    FORMAT("q8_0", Q8_0, (pack<Q8_0, BlockQ8_0>)),
    FORMAT("q4_k", Q4_K, (pack<Q4_K, BlockQ4_K>)),
    FORMAT("q5_k", Q5_K, (pack<Q5_K, BlockQ5_K>)),
    FORMAT("q6_k", Q6_K, (pack<Q6_K, BlockQ6_K>)),
#undef FORMAT
    {nullptr, nullptr},
};

#ifdef __AVX512BF16__  // every processor with AMX has it
constexpr lightwell::NamedFunction FUNCTIONS_ON_TILES[] = {
    {"linear_bfloat16", linear<BFloat16, TileProducts<BFloat16>>},
    {"paged_attention", paged_attention_on_tiles},
#define FORMAT(NAME, FORMAT) {"linear_" NAME, linear_by_origin<FORMAT, VectorProducts<FORMAT>, TileProducts<FORMAT>>}
    FORMAT("int8", Q8_0),
    FORMAT("q4_0", Q4_0),
    FORMAT("q4_1", Q4_1),
    FORMAT("q5_0", Q5_0),
    FORMAT("q5_1", Q5_1),
    FORMAT("q8_0", Q8_0),
    FORMAT("q4_k", Q4_K),
    FORMAT("q5_k", Q5_K),
    FORMAT("q6_k", Q6_K),
#undef FORMAT
    {nullptr, nullptr},
};
#endif

}  // namespace

#define JOIN_NAME(name, isa) name##_##isa
#define NAME_OF(name, isa) JOIN_NAME(name, isa)

extern "C" const lightwell::NamedFunction* NAME_OF(lightwell_functions, LIGHTWELL_ISA)() { return FUNCTIONS; }

// Layouts are the same on all code paths.
extern "C" const lightwell::Field* NAME_OF(lightwell_fields, LIGHTWELL_ISA)() { return FIELDS; }

#ifdef __AVX512BF16__
extern "C" const lightwell::NamedFunction* lightwell_functions_amx() { return FUNCTIONS_ON_TILES; }
#endif
