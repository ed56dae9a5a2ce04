// The functions that programs call, and the layout of the structs that Python fills in: tables that library.cpp reads.
#pragma once

#include <stdint.h>

#include "team.h"

namespace lightwell {

struct NamedFunction {
    const char* name;
    Function function;
};

// Of attention.cpp, linear.cpp, linear_blocks.cpp, linear_k.cpp and rows.cpp, each ended by a null name.
extern const NamedFunction ATTENTION_FUNCTIONS[], LINEAR_FUNCTIONS[], BLOCK_FUNCTIONS[], K_FUNCTIONS[], ROW_FUNCTIONS[];

// A field of a struct that Python fills in. Library in library.py compares it with its counterpart in c_structs.py.
struct Field {
    const char* struct_name;
    int64_t struct_size;
    const char* name;
    int64_t offset;
};

extern const Field FIELDS[];  // ended by a null name

}  // namespace lightwell

using lightwell::barrier;
using lightwell::num_threads;
using lightwell::Tasks;
using lightwell::Worker;
