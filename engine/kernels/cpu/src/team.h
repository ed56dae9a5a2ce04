// A team of threads that runs a program: all of them go through the same calls and meet after each.
#pragma once

#include <stdint.h>

namespace lightwell {

struct Team;

// What a function of the program sees of its thread.
struct Worker {
    Team* team;
    int index;
};

int num_threads(const Worker& worker);

// The next `grain` of `total` tasks, as the first of them; `total` or more when none are left. Every thread of the team
// must ask until then, and each barrier starts anew.
int64_t next_task(const Worker& worker, int64_t grain);

void barrier(const Worker& worker);

// One entry of a program.
using Function = void (*)(const void* parameters, const Worker& worker);

struct Call {
    Function function;
    const void* parameters;
};

}  // namespace lightwell
