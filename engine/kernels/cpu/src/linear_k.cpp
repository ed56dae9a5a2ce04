// Matrix products with weights in blocks of 256 that have scales of their groups.

#include "products.h"

const lightwell::NamedFunction lightwell::K_FUNCTIONS[] = {
    QUANTISED("q2_k", Q2_K),
    QUANTISED("q3_k", Q3_K),
    QUANTISED("q4_k", Q4_K),
    QUANTISED("q5_k", Q5_K),
    QUANTISED("q6_k", Q6_K),
    {nullptr, nullptr},
};
