// The threads that run ops together: who takes which task, and when all have arrived.
#pragma once

#include <atomic>
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define RL_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define RL_PAUSE() asm volatile("yield")
#else
#define RL_PAUSE()
#endif

namespace roofline {

// What the threads of a team share; a phase is the tasks between two barriers.
struct alignas(64) Shared {
    alignas(64) std::atomic<int64_t> next[3];  // tasks taken in a phase, by phase modulo 3
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<uint64_t> phase{0};
};

// One thread's view. Which thread does a task changes no bit of its result.
class Team {
  public:
    Team(Shared& shared, int rank, int size) : rank(rank), size(size), shared_(shared) {}

    const int rank, size;

    // Run task(i) for i in [0, count), each by one of the threads, then wait for all.
    template <class Task>
    void run(int64_t count, Task&& task) {
        std::atomic<int64_t>& next = shared_.next[phase_ % 3];
        for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
             i = next.fetch_add(1, std::memory_order_relaxed))
            task(i);
        barrier();
    }

    // Wait until every thread has come here.
    void barrier() {
        const uint64_t phase = phase_++;
        if (shared_.arrived.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
            shared_.arrived.store(0, std::memory_order_relaxed);
            // Nobody is in phase + 2 yet, and all have left phase - 1, whose counter that is.
            shared_.next[(phase + 2) % 3].store(0, std::memory_order_relaxed);
            shared_.phase.store(phase_, std::memory_order_release);
            return;
        }
        for (int spins = 0; shared_.phase.load(std::memory_order_acquire) == phase; ++spins) {
            RL_PAUSE();
            if (spins > 2000) give_way();
        }
    }

    // Take the phase up where the team stands, before the first task of a run.
    void join() { phase_ = shared_.phase.load(std::memory_order_acquire); }

  private:
    static void give_way();  // to whatever else wants this core

    Shared& shared_;
    uint64_t phase_ = 0;
};

}  // namespace roofline
