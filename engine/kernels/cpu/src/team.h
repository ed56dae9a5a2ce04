// A team of threads that runs a program: all threads make the same calls, with a barrier after each.
#pragma once

#include <stdint.h>

namespace lightwell {

struct Team;

// The thread that a function runs on.
struct Worker {
    Team* team;
    int index;
};

int num_threads(const Worker& worker);

void barrier(const Worker& worker);

// Shares out the tasks 0..total, `grain` at a time. Each thread has a part, the same for the same total, so that the
// data of one call is in its cache in the next. A thread that has finished its part helps with the parts of others. With
// several `rounds`, all tasks of a part run once in each round. A barrier resets the counters.
class Tasks {
  public:
    Tasks(const Worker& worker, int64_t total, int64_t grain, int64_t rounds = 1);

    // Takes the next tasks, first..last. Returns false when none is left.
    bool next();

    int64_t first = 0, last = 0;  // counted from `begin` through all rounds
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

}  // namespace lightwell
