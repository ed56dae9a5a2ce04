// The library's C interface: the team of threads, and the functions of each code path.
//
// Barriers are microseconds apart when all threads run. A waiting thread spins for that long, then yields its core,
// which the thread it waits for may need, and finally sleeps.

#include "functions.h"

#include <cpuid.h>
#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

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

struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
};

struct Team {
    int num_threads;
    Counter* taken;  // number of tasks taken from each thread's part
    pthread_t* threads;  // without the calling thread
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

struct Start {
    Team* team;
    int index;
};

void* thread_main(void* argument) {
    Start* start = static_cast<Start*>(argument);
    Worker worker{start->team, start->index};
    delete start;
    while (true) {
        barrier(worker);  // until there is a program to run
        if (worker.team->num_calls < 0) return nullptr;
        run_calls(worker);
    }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) Team* lightwell_new_team(int num_threads) {
    Team* team = new Team;
    team->num_threads = num_threads;
    team->taken = new Counter[num_threads];
    team->threads = new pthread_t[num_threads];
    for (int i = 1; i < num_threads; i++) {
        Start* start = new Start{team, i};
        if (pthread_create(&team->threads[i], nullptr, thread_main, start) != 0) {
            delete start;
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
    delete[] team->taken;
    delete[] team->threads;
    delete team;
}

static bool has_f16c() {  // some compilers' __builtin_cpu_supports does not know it
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

// Returns whether the processor has AMX with bfloat16 and the system permits its use, which a process must request.
static bool may_use_amx() {
#if defined(__x86_64__)
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    const bool has_amx_tile = edx >> 24 & 1, has_amx_bf16 = edx >> 22 & 1;
    return has_amx_tile && has_amx_bf16 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

// Returns the best code path of this processor: "amx", "avx512_bf16", "avx512", "avx2", or "" for none.
extern "C" __attribute__((visibility("default"))) const char* lightwell_best_isa() {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
                      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (avx512_bf16 && may_use_amx()) return "amx";
    return avx512_bf16 ? "avx512_bf16" : avx512 ? "avx512" : avx2 ? "avx2" : "";
}

// Returns the fields of all structs that Python fills in, ended by a null name.
extern "C" __attribute__((visibility("default"))) const Field* lightwell_fields() { return lightwell_fields_avx2(); }

static Function find(const NamedFunction* functions, const char* name) {
    for (; functions->name; functions++)
        if (strcmp(functions->name, name) == 0) return functions->function;
    return nullptr;
}

// Returns the function of that name for a code path; null if there is none.
extern "C" __attribute__((visibility("default"))) Function lightwell_function(const char* isa, const char* name) {
    if (strcmp(isa, "amx") == 0) {
        const Function function = find(lightwell_functions_amx(), name);
        return function ? function : lightwell_function("avx512_bf16", name);
    }
    if (strcmp(isa, "avx512_bf16") == 0) return find(lightwell_functions_avx512_bf16(), name);
    if (strcmp(isa, "avx512") == 0) return find(lightwell_functions_avx512(), name);
    return find(lightwell_functions_avx2(), name);
}

}  // namespace lightwell
