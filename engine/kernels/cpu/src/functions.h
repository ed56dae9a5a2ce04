// The functions that programs call: tables that library.cpp reads.
#pragma once

#include "structs.h"
#include "team.h"

namespace lightwell {

struct NamedFunction {
    const char* name;
    Function function;
};

// Of attention.cpp, linear.cpp, linear_blocks.cpp, linear_k.cpp and rows.cpp, each ended by a null name.
extern const NamedFunction ATTENTION_FUNCTIONS[], LINEAR_FUNCTIONS[], BLOCK_FUNCTIONS[], K_FUNCTIONS[], ROW_FUNCTIONS[];

}  // namespace lightwell

using lightwell::barrier;
using lightwell::num_threads;
using lightwell::Tasks;
using lightwell::Worker;
