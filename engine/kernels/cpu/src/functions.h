// How library.cpp finds the functions of each code path.
#pragma once

#include "team.h"

namespace lightwell {

struct NamedFunction {
    const char* name;
    Function function;
};

}  // namespace lightwell

extern "C" {
const lightwell::NamedFunction* lightwell_functions_avx2();
const lightwell::NamedFunction* lightwell_functions_avx512();
const lightwell::NamedFunction* lightwell_functions_avx512_bf16();
const lightwell::NamedFunction* lightwell_functions_amx();  // only those that differ from avx512_bf16
}
