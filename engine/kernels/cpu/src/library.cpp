// The library's C interface: the team of threads, and its functions.
//
// Barriers are microseconds apart when all threads run. A waiting thread spins for that long, then yields its core,
// which the thread it waits for may need, and finally sleeps.

#include "functions.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <initializer_list>
#include <new>

namespace lightwell {

namespace {

constexpr int SPINS = 512;  // a few microseconds
// Longer than it takes to wake a thread; otherwise the other threads would be asleep by the time that it is awake.
constexpr int64_t YIELD_NANOSECONDS = 1'000'000;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

}  // namespace

// Like new[], which would need the C++ runtime: the library then runs wherever there is a libc.
template <class T>
T* allocate(uint32_t num) {
    T* items = static_cast<T*>(aligned_alloc(64, (num * sizeof(T) + 63) / 64 * 64));
    for (uint32_t i = 0; i < num; i++) new (items + i) T{};
    return items;
}

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

struct Team {
    int num_threads;
    Counter* taken;  // number of tasks taken from each thread's part
    pthread_t* threads;  // without the calling thread
    Worker* workers;
    const Call* calls = nullptr;
    int64_t num_calls = 0;  // -1 ends the threads
    int64_t* durations = nullptr;
    alignas(64) std::atomic<int> num_arrived{0};
    alignas(64) std::atomic<uint32_t> round{0};
    std::atomic<int> num_sleeping{0};
};

int num_threads(const Worker& worker) { return worker.team->num_threads; }

Tasks::Tasks(const Worker& worker, int64_t total, int64_t grain, int64_t rounds)
    : team(*worker.team), total(total), grain(grain), rounds(rounds) {
    enter_part(worker.index);
}

void Tasks::enter_part(int new_part) {
    part = new_part;
    begin = total * part / team.num_threads;
    size = total * (part + 1) / team.num_threads - begin;
}

bool Tasks::next() {
    for (; num_finished < team.num_threads; num_finished++, enter_part((part + 1) % team.num_threads)) {
        std::atomic<int64_t>& taken = team.taken[part].value;
        const int64_t num_tasks = size * rounds;
        if (taken.load(std::memory_order_relaxed) >= num_tasks) continue;
        const int64_t start = taken.fetch_add(grain, std::memory_order_relaxed);
        if (start >= num_tasks) continue;
        first = begin + start;
        last = begin + (start + grain < num_tasks ? start + grain : num_tasks);
        return true;
    }
    return false;
}

void barrier(const Worker& worker) {
    Team& team = *worker.team;
    uint32_t round = team.round.load(std::memory_order_acquire);
    if (team.num_arrived.fetch_add(1, std::memory_order_acq_rel) == team.num_threads - 1) {
        team.num_arrived.store(0, std::memory_order_relaxed);
        for (int i = 0; i < team.num_threads; i++) team.taken[i].value.store(0, std::memory_order_relaxed);
        team.round.store(round + 1, std::memory_order_seq_cst);
        if (team.num_sleeping.load(std::memory_order_seq_cst)) wake_all(team.round);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (team.round.load(std::memory_order_acquire) != round) return;
        pause();
    }
    const int64_t end = nanoseconds() + YIELD_NANOSECONDS;
    while (nanoseconds() < end) {
        if (team.round.load(std::memory_order_acquire) != round) return;
        sched_yield();
    }
    team.num_sleeping.fetch_add(1, std::memory_order_seq_cst);
    while (team.round.load(std::memory_order_seq_cst) == round) sleep_while(team.round, round);
    team.num_sleeping.fetch_sub(1, std::memory_order_relaxed);
}

namespace {

void run_calls(const Worker& worker) {
    // Copied, because the team may be given another program as soon as a thread has passed the last barrier.
    const Call* const calls = worker.team->calls;
    const int64_t num_calls = worker.team->num_calls;
    int64_t* const durations = worker.index == 0 ? worker.team->durations : nullptr;
    int64_t started = durations ? nanoseconds() : 0;
    for (int64_t i = 0; i < num_calls; i++) {
        calls[i].function(calls[i].parameters, worker);
        barrier(worker);
        if (durations) {
            int64_t now = nanoseconds();
            durations[i] += now - started;
            started = now;
        }
    }
}

void* thread_main(void* argument) {
    const Worker& worker = *static_cast<Worker*>(argument);
    while (true) {
        barrier(worker);  // until there is a program to run
        if (worker.team->num_calls < 0) return nullptr;
        run_calls(worker);
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Team* lightwell_new_team(int num_threads) {
    Team* team = allocate<Team>(1);
    team->num_threads = num_threads;
    team->taken = allocate<Counter>(uint32_t(num_threads));
    team->threads = allocate<pthread_t>(uint32_t(num_threads));
    team->workers = allocate<Worker>(uint32_t(num_threads));
    for (int i = 1; i < num_threads; i++) {
        team->workers[i] = {team, i};
        if (pthread_create(&team->threads[i], nullptr, thread_main, &team->workers[i]) != 0) {
            team->num_threads = i;  // no thread has passed a barrier yet
            break;
        }
    }
    return team;
}

extern "C" __attribute__((visibility("default"))) int lightwell_team_size(const Team* team) {
    return team->num_threads;
}

// Runs the calls in order. Adds the nanoseconds of each to durations[num_calls] if that is not null.
extern "C" __attribute__((visibility("default"))) void lightwell_run(
    Team* team, const Call* calls, int64_t num_calls, int64_t* durations) {
    team->calls = calls;
    team->num_calls = num_calls;
    team->durations = durations;
    Worker worker{team, 0};
    barrier(worker);
    if (num_calls >= 0) run_calls(worker);
}

extern "C" __attribute__((visibility("default"))) void lightwell_delete_team(Team* team) {
    lightwell_run(team, nullptr, -1, nullptr);
    for (int i = 1; i < team->num_threads; i++) pthread_join(team->threads[i], nullptr);
    for (void* memory : {(void*)team->taken, (void*)team->threads, (void*)team->workers, (void*)team}) free(memory);
}

// The text of structs.h, which Library in library.py compares with its own.
asm(R"(
    .pushsection .rodata
    .globl lightwell_structs
lightwell_structs:
    .incbin "structs.h"
    .byte 0
    .popsection
)");

// Returns the function of that name; null if there is none.
extern "C" __attribute__((visibility("default"))) Function lightwell_function(const char* name) {
    for (const NamedFunction* functions : {ATTENTION_FUNCTIONS, LINEAR_FUNCTIONS, BLOCK_FUNCTIONS, K_FUNCTIONS, ROW_FUNCTIONS})
        for (; functions->name; functions++)
            if (strcmp(functions->name, name) == 0) return functions->function;
    return nullptr;
}

}  // namespace lightwell
