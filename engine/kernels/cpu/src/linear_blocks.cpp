// Matrix products with weights in blocks of 32 with a scale each.

#include "products.h"

const lightwell::NamedFunction lightwell::BLOCK_FUNCTIONS[] = {
    QUANTISED("int8", Q8_0),
    QUANTISED("q4_0", Q4_0),
    QUANTISED("q4_1", Q4_1),
    QUANTISED("q5_0", Q5_0),
    QUANTISED("q5_1", Q5_1),
    QUANTISED("q8_0", Q8_0),
    {nullptr, nullptr},
};
