// The tables that unit.cpp makes for library.cpp: the functions of each code path, and the layout of the structs.
#pragma once

#include <stdint.h>

#include "team.h"

namespace lightwell {

struct NamedFunction {
    const char* name;
    Function function;
};

// A field of a struct that Python fills in. Library in library.py compares it with its counterpart in c_structs.py.
struct Field {
    const char* struct_name;
    int64_t struct_size;
    const char* name;
    int64_t offset;
};

}  // namespace lightwell

extern "C" {
const lightwell::NamedFunction* lightwell_functions_avx2();
const lightwell::NamedFunction* lightwell_functions_avx512();
const lightwell::NamedFunction* lightwell_functions_avx512_bf16();
const lightwell::NamedFunction* lightwell_functions_amx();  // only those that differ from avx512_bf16
const lightwell::Field* lightwell_fields_avx2();
}
