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

void barrier(const Worker& worker);

// Shares out the tasks 0..total, a few at a time. Each thread has a part, the same for the same total: what it works on
// in one call lies in its cache in the next. One that has finished its part helps with the others'. Where there are
// `rounds`, all tasks of a part come once in each. Each barrier starts anew.
class Tasks {
  public:
    Tasks(const Worker& worker, int64_t total, int64_t grain, int64_t rounds = 1);

    // Takes what is next, first..last; false when nothing is left.
    bool next();

    int64_t first = 0, last = 0;  // counted on from `begin`, through all rounds
    int64_t task(int64_t taken) const { return begin + (taken - begin) % size; }
    int64_t round(int64_t taken) const { return (taken - begin) / size; }
    bool is_last_of_round(int64_t taken) const { return (taken - begin) % size == size - 1; }

  private:
    void enter_part(int part);

    Team& team;
    const int64_t total, grain, rounds;
    int part, num_finished = 0;
    int64_t begin = 0, size = 0;
};

// One entry of a program.
using Function = void (*)(const void* parameters, const Worker& worker);

struct Call {
    Function function;
    const void* parameters;
};

}  // namespace lightwell
