// Attention over the KV cache.

#include "functions.h"

#include "attention.h"
#ifdef LIGHTWELL_TILES
#include "tile_attention.h"
#endif

const lightwell::NamedFunction lightwell::ATTENTION_FUNCTIONS[] = {
    {"plan_attention", plan_attention},
#ifdef LIGHTWELL_TILES
    {"paged_attention", paged_attention_on_tiles},
#else
    {"paged_attention", paged_attention},
#endif
    {nullptr, nullptr},
};
