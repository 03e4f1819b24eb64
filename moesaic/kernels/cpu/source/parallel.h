// Work on all cores with the threads that PyTorch already has, in one team per call.
//
// A kernel opens one team and goes through its phases with the team's own barrier: it spins for some microseconds, then
// yields the core. A thread that another program has pushed off its core costs the others what it missed, not a
// multiple, because tasks beyond each thread's first are taken one by one and not dealt out beforehand.
//
// Where a member is refused memory (std::bad_alloc), those that wait for it leave by the same exception, and so does the
// call, on the thread that made it.
#pragma once

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "tiles.h"

// GNU OpenMP's entry points, which LLVM's and Intel's run times have too: nothing here depends on the compiler's own.
extern "C" {
void GOMP_parallel(void (*function)(void*), void* data, unsigned num_threads, unsigned flags);
int omp_get_max_threads();
int omp_get_thread_num();
int omp_get_num_threads();
int omp_in_parallel();
}

namespace moesaic {

// What the members of a team share, every number on cache lines of its own (processors fetch them in pairs): handing a
// line from one core to another takes up to a quarter of a microsecond, and a decode comes to some hundred barriers.
struct TeamState {
    static constexpr int kCounters = 4, kFlags = 8;
    struct alignas(128) Number {
        std::atomic<long> value{0};
    };
    Number taken[kCounters];  // tasks of a phase, beyond the first one of each member
    Number reached[kFlags];   // barriers that each member has come to, where there are few members
    Number arrivals, passed;  // of all, and barriers that all have come to, where there are many
    std::atomic<bool> lacks_memory{false};  // a member has left
};

// One member's hold on its team.
class Team {
  public:
    Team(TeamState& state, int size, int member) : state_(state), size_(size), member_(member) {}

    int size() const { return size_; }
    int member() const { return member_; }

    // Wait until every member is here.
    void barrier() {
        const long phase = ++phase_;
        _mm_sfence();  // a release orders all stores but those past the caches
        if (size_ == 1) return;
        if (size_ <= TeamState::kFlags) {
            state_.reached[member_].value.store(phase, std::memory_order_release);
            for (int other = 0; other < size_; ++other)
                if (other != member_) wait_for(state_.reached[other].value, phase);
        } else if (state_.arrivals.value.fetch_add(1, std::memory_order_acq_rel) + 1 == phase * size_) {
            state_.passed.value.store(phase, std::memory_order_release);
        } else {
            wait_for(state_.passed.value, phase);
        }
        // The next phase's counter was last used three phases ago, and is not again before everyone has met.
        const int next = int((phase + 1) % TeamState::kCounters);
        if (member_ == 0 && is_used_[next]) state_.taken[next].value.store(0, std::memory_order_relaxed);
        is_used_[next] = false;
    }

    // Wait until a number that another member raises is at least so much.
    void wait_for(const std::atomic<long>& number, long least) const {
        constexpr int kSpins = 4000;
        for (int spin = 0; number.load(std::memory_order_acquire) < least; ++spin) {
            if (spin < kSpins) {
                __builtin_ia32_pause();
            } else {
                if (state_.lacks_memory.load(std::memory_order_relaxed)) throw std::bad_alloc();
                sched_yield();
            }
        }
    }

    // Call task(i) for i in [0, count), each once: the first ones by the member of that number, the others by whoever is
    // free. Returns when all are done. Every member calls this, with equal arguments.
    template <typename Task>
    void tasks(long count, Task&& task) {
        const auto call = [&](long i) {
            before_task();
            task(i);
        };
        if (count <= size_) {
            if (member_ < count) call(long(member_));
        } else if (size_ == 1) {
            for (long i = 0; i < count; ++i) call(i);
        } else {
            const int counter = int(phase_ % TeamState::kCounters);
            is_used_[counter] = true;
            std::atomic<long>& taken = state_.taken[counter].value;
            for (long i = member_; i < count; i = size_ + taken.fetch_add(1, std::memory_order_relaxed)) call(i);
        }
        barrier();
    }

  private:
    TeamState& state_;
    const int size_, member_;
    long phase_ = 0;
    bool is_used_[TeamState::kCounters] = {};
};

// So few rows every member prepares for itself: to hand one over takes longer than to make it.
constexpr int64_t kPrivateRows = 2;
inline bool are_private(int64_t rows) { return rows <= kPrivateRows; }

// Panels (or tasks) in a row cut into slices for `threads`, each a thread's share of what is left and at most `most`:
// long ones first, since a stream from memory needs some kilobytes to come up to speed, and short ones at the end, so
// that the threads finish together.
struct Slices {
    int panels, threads, most;

    int width(int left) const { return std::max(1, std::min(most, left / threads)); }
    // The first panel of slice `index`; `panels` behind the last one.
    int begin(int index) const {
        // The first ones are all of full width.
        int at = most * std::min(index, std::max(0, panels / most - threads));
        for (int i = at / most; i < index && at < panels; ++i) at += width(panels - at);
        return at;
    }
    // Calls body(the first panel of a slice) for all slices but the first, in order.
    template <typename Body>
    void each_border(Body&& body) const {
        const int full = std::max(0, panels / most - threads);
        for (int at = full > 0 ? most : width(panels), index = 1; at < panels; ++index) {
            body(at);
            at += index < full ? most : width(panels - at);
        }
    }
    int count() const {
        int count = std::max(0, panels / most - threads);
        for (int at = begin(count); at < panels; ++count) at += width(panels - at);
        return count;
    }
};

// Run body(team) on every thread: torch.get_num_threads() of them, or one inside somebody else's parallel region.
// `work` is an estimate of the fp32 operations to do; too little to share is done by the calling thread.
// Throws std::bad_alloc where a thread does.
template <typename Body>
void run_team(double work, Body&& body) {
    int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    if (work < 2e5) threads = 1;
    struct Call {
        TeamState state;
        int size;
        unsigned arithmetic;  // how the caller rounds and takes subnormals: a setting of each thread's own
        std::remove_reference_t<Body>* body;

        void run(int team_size, int member) {
            try {
                Team team(state, team_size, member);
                (*body)(team);
            } catch (const std::bad_alloc&) {
                state.lacks_memory.store(true, std::memory_order_relaxed);
            }
            leave_tiles();
        }
    } call{{}, threads, _mm_getcsr(), &body};
    if (threads == 1) {
        call.run(1, 0);
        if (call.state.lacks_memory) throw std::bad_alloc();
        return;
    }
    GOMP_parallel(
        [](void* data) {
            Call& shared = *static_cast<Call*>(data);
            const int member = omp_get_thread_num();
            // Fewer threads than asked for would wait for ever at the first barrier.
            const bool is_whole = omp_get_num_threads() == shared.size;
            const unsigned before = _mm_getcsr();
            _mm_setcsr(shared.arithmetic);
            if (is_whole || member == 0) shared.run(is_whole ? shared.size : 1, member);
            _mm_setcsr(before);
        },
        &call, unsigned(threads), 0);
    if (call.state.lacks_memory) throw std::bad_alloc();
}

// A buffer that lives as long as its thread and only grows: fresh pages cost more than the work done on them.
class Scratch {
  public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(data_); }

    // At least count elements, aligned to 64 bytes, of unspecified content; earlier pointers of this buffer are dead.
    template <typename T>
    T* get(size_t count) {
        const size_t wanted = count * sizeof(T), page = wanted < kHugePage ? 4096 : kHugePage;
        if (wanted > size_) {
            const size_t bytes = (wanted + page - 1) / page * page;
            std::free(data_);
            size_ = 0;
            data_ = std::aligned_alloc(page, bytes);
            if (!data_) throw std::bad_alloc();
            if (page == kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

  private:
    static constexpr size_t kHugePage = size_t(2) << 20;
    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace moesaic
