#include "pool.h"

namespace roofline {

namespace {
constexpr int SPINS_AWAKE = 20000;  // about 0.3 ms: the next op of a step comes much sooner
constexpr uint64_t OPEN = 1 << 16, JOB = OPEN * 2;  // bits of the gate; below them who went in
}

void Team::give_way() { std::this_thread::yield(); }

Pool::Pool(int threads) : size_(threads), team_(shared_, threads) {
    try {
        for (int i = 1; i < threads; ++i) threads_.emplace_back(&Pool::follow, this);
    } catch (...) {  // the system gives no more
        close();
        throw;
    }
}

Pool::~Pool() { close(); }

void Pool::close() {
    closing_.store(true);
    gate_.fetch_add(JOB);
    gate_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Pool::play(const Tape& tape) {
    tape_ = &tape;
    run();
}

void Pool::run(Kernel kernel, const void* arguments) {
    tape_ = nullptr;
    kernel_ = kernel;
    arguments_ = arguments;
    run();
}

void Pool::run() {
    first_phase_ = team_.phase();
    left_.store(0);
    gate_.store((gate_.load() / JOB + 1) * JOB + OPEN);
    if (asleep_.load() > 0) gate_.notify_all();
    work(team_);
    const uint64_t entered = gate_.fetch_and(~OPEN) % OPEN;
    for (int spins = 0; left_.load(std::memory_order_acquire) != entered; ++spins) Team::pause(spins);
}

void Pool::work(Team& team) {
    if (tape_) tape_->play(team);
    else kernel_(arguments_, team);
}

void Pool::follow() {
    Team team(shared_, size_);
    uint64_t seen = 0;  // the gate when there was nothing to do
    for (;;) {
        if (enter(seen)) {
            team.skip_to(first_phase_);
            work(team);
            left_.fetch_add(1, std::memory_order_acq_rel);
        }
        if (closing_.load()) return;  // after `seen` was read: a gate that moves later ends the wait
        for (int spins = 0; gate_.load(std::memory_order_acquire) == seen && spins < SPINS_AWAKE; ++spins)
            RL_PAUSE();
        if (gate_.load() == seen) {
            asleep_.fetch_add(1);
            gate_.wait(seen);
            asleep_.fetch_sub(1);
        }
    }
}

// Go in where the gate is open; `seen` is the gate as it was left.
bool Pool::enter(uint64_t& seen) {
    const uint64_t done = seen / JOB;
    seen = gate_.load();
    while (seen & OPEN && seen / JOB != done)
        if (gate_.compare_exchange_weak(seen, seen + 1)) {
            ++seen;
            return true;
        }
    return false;
}

}  // namespace roofline
