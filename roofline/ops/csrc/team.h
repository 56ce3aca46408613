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

// What the threads of a team share. A phase is the tasks of one `Team::run`, counted from the
// first of all: it is over when its tasks are done, whether or not every thread took part. So a
// thread that has lost its core to another program holds nobody up; it skips what it missed.
struct Shared {
    alignas(64) std::atomic<uint64_t> claims{0};  // the phase, and below it the tasks taken
    alignas(64) std::atomic<int64_t> done{0};     // tasks of the phase
};

// One thread's view. Which thread does a task changes no bit of its result.
class Team {
  public:
    Team(Shared& shared, int size) : size(size), shared_(shared) {}

    const int size;

    // Run task(i) for every i in [0, count), each on one of the threads; return when all are done.
    // `grain` tasks are taken at a time. Every thread must come here with the same count.
    template <class Task>
    void run(int64_t count, int64_t grain, Task&& task) {
        const uint64_t phase = phase_++ << TASK_BITS;
        if (count == 0) {  // nobody would end the phase
            uint64_t expected = phase;
            shared_.claims.compare_exchange_strong(expected, phase_ << TASK_BITS);
            return;
        }
        uint64_t claims = shared_.claims.load(std::memory_order_acquire);
        while (claims >> TASK_BITS == phase >> TASK_BITS) {
            const int64_t first = int64_t(claims - phase);
            if (first >= count) {
                wait_past(phase);
                return;
            }
            const int64_t last = first + grain < count ? first + grain : count;
            if (!shared_.claims.compare_exchange_weak(claims, phase + uint64_t(last),
                                                      std::memory_order_acq_rel))
                continue;
            for (int64_t i = first; i < last; ++i) task(i);
            if (shared_.done.fetch_add(last - first, std::memory_order_acq_rel) + last - first == count) {
                shared_.done.store(0, std::memory_order_relaxed);
                shared_.claims.store(phase_ << TASK_BITS, std::memory_order_release);
                return;
            }
            claims = shared_.claims.load(std::memory_order_acquire);
        }
    }

    // One turn of a wait.
    static void pause(int spins) {
        RL_PAUSE();
        if (spins > SPINS) give_way();
    }

    uint64_t phase() const { return phase_; }
    void skip_to(uint64_t phase) { phase_ = phase; }

  private:
    static constexpr int TASK_BITS = 32;
    static constexpr int SPINS = 4000;  // some 0.1 ms, then others may have this core

    void wait_past(uint64_t phase) {
        for (int spins = 0; shared_.claims.load(std::memory_order_acquire) >> TASK_BITS ==
                            phase >> TASK_BITS; ++spins)
            pause(spins);
    }
    static void give_way();

    Shared& shared_;
    uint64_t phase_ = 0;
};

}  // namespace roofline
