// Threads of our own, and what they run: a list of ops, from first to last, all threads together.
#pragma once

#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "abi.h"
#include "team.h"

namespace roofline {

// Ops and their arguments, recorded once and run as often as wanted. Running allocates nothing.
class Tape {
  public:
    void add(Kernel kernel, const void* arguments, int64_t bytes) {
        auto copy = std::make_unique<char[]>(size_t(bytes));
        std::memcpy(copy.get(), arguments, size_t(bytes));
        entries_.push_back({kernel, std::move(copy)});
    }
    void play(Team& team) const {
        for (const Entry& entry : entries_) entry.kernel(entry.arguments.get(), team);
    }

  private:
    struct Entry {
        Kernel kernel;
        std::unique_ptr<char[]> arguments;
    };
    std::vector<Entry> entries_;
};

// The caller is one of the threads; the others spin for a while after their work, then sleep.
//
// A job has a gate. Who comes while it is open takes part and is waited for; who comes late, having
// found no core to run on, is not missed. The gate is one word: the job's number, whether it is open,
// and how many have gone in.
class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();

    void play(const Tape& tape);
    void run(Kernel kernel, const void* arguments);

  private:
    void run();
    void close();
    void work(Team& team);
    void follow();
    bool enter(uint64_t& seen);

    const int size_;
    Shared shared_;
    Team team_;  // the caller's
    Kernel kernel_ = nullptr;
    const void* arguments_ = nullptr;
    const Tape* tape_ = nullptr;
    uint64_t first_phase_ = 0;  // of the job
    alignas(64) std::atomic<uint64_t> gate_{0};
    alignas(64) std::atomic<uint64_t> left_{0};  // of those who went in
    alignas(64) std::atomic<int> asleep_{0};
    std::atomic<bool> closing_{false};
    std::vector<std::thread> threads_;
};

}  // namespace roofline
