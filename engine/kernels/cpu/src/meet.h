// The meeting of several processes: none goes on before all have come.
#pragma once

#include <sched.h>
#include <time.h>

#include <atomic>

#include "functions.h"
#include "simd.h"

namespace {

constexpr int64_t MEET_SPINS = 2048;        // tens of microseconds, as long as the parts of a product differ
constexpr int64_t MEET_YIELDS = 4096;       // then another process may need the core
constexpr long MEET_SLEEP_NANOSECONDS = 100'000;  // and finally, one that has been stopped costs little

struct alignas(64) MeetCounter {
    std::atomic<int64_t> num_met;
};

// What the processes have written before is visible to all of them afterwards.
void meet(const void* parameters, const Worker& worker) {
    const MeetParameters& p = *(const MeetParameters*)parameters;
    if (worker.index != 0) return;
    const int64_t num_met = ++*p.num_met;
    p.counters[p.rank].num_met.store(num_met, std::memory_order_release);
    int64_t tries = 0;
    for (int64_t rank = 0; rank < p.num_ranks; rank++)
        while (p.counters[rank].num_met.load(std::memory_order_acquire) < num_met) {
            tries++;
            if (tries < MEET_SPINS) {
                _mm_pause();
            } else if (tries < MEET_SPINS + MEET_YIELDS) {
                sched_yield();
            } else {
                const timespec pause{0, MEET_SLEEP_NANOSECONDS};
                nanosleep(&pause, nullptr);
            }
        }
}

}  // namespace
