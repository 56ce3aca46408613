#include "pool.h"

namespace roofline {

namespace {
constexpr int SPINS_AWAKE = 20000;  // about 0.3 ms: the next op of a step comes much sooner
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
    start();
    for (std::thread& thread : threads_) thread.join();
}

void Pool::play(const Tape& tape) {
    tape_ = &tape;
    start();
    work(team_);
}

void Pool::run(Kernel kernel, const void* arguments) {
    tape_ = nullptr;
    kernel_ = kernel;
    arguments_ = arguments;
    start();
    work(team_);
}

void Pool::start() {
    job_.fetch_add(1);
    if (asleep_.load() > 0) job_.notify_all();
}

void Pool::work(Team& team) {
    if (tape_) tape_->play(team);
    else kernel_(arguments_, team);
    team.join();
}

void Pool::follow() {
    Team team(shared_, size_);
    for (uint64_t seen = 0;;) {
        for (int spins = 0; job_.load(std::memory_order_acquire) == seen && spins < SPINS_AWAKE; ++spins)
            RL_PAUSE();
        if (job_.load() == seen) {
            asleep_.fetch_add(1);
            job_.wait(seen);
            asleep_.fetch_sub(1);
        }
        seen = job_.load();
        if (closing_.load()) return;
        work(team);
    }
}

}  // namespace roofline
