// Work on all cores with the threads that PyTorch already has, in one team per call.
//
// A kernel opens one team and goes through its phases with the team's own barrier: it spins for some microseconds, then
// yields the core. A thread that another program has pushed off its core costs the others what it missed, not a
// multiple, because tasks are taken one by one and not dealt out beforehand.
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

class Team {
  public:
    explicit Team(int size) : size_(size) {}

    int size() const { return size_; }

    // Wait until every thread of the team is here.
    void barrier() {
        if (size_ == 1) {
            counters_[(++solo_phase_ + 1) % kCounters].store(0, std::memory_order_relaxed);
            return;
        }
        const int generation = generation_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            // The counter after next is out of use by now: everyone has left the phase that last took from it.
            counters_[(generation + 2) % kCounters].store(0, std::memory_order_relaxed);
            generation_.store(generation + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; generation_.load(std::memory_order_acquire) == generation; ++spin) {
            if (spin < kSpins)
                __builtin_ia32_pause();
            else
                sched_yield();
        }
    }

    // Call task(i) for i in [0, count), each once, by whichever thread is free; returns when all are done.
    // Every thread of the team calls this, with equal arguments.
    template <typename Task>
    void tasks(long count, Task&& task) {
        const int phase = size_ == 1 ? solo_phase_ : generation_.load(std::memory_order_acquire);
        std::atomic<long>& counter = counters_[phase % kCounters];
        for (long i; (i = counter.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
        barrier();
    }

  private:
    static constexpr int kCounters = 4;
    static constexpr int kSpins = 4000;
    const int size_;
    int solo_phase_ = 0;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> generation_{0};
    alignas(64) std::atomic<long> counters_[kCounters] = {};
};

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
    int count() const {
        int count = std::max(0, panels / most - threads);
        for (int at = begin(count); at < panels; ++count) at += width(panels - at);
        return count;
    }
};

// Run body(team) on every thread: torch.get_num_threads() of them, or one inside somebody else's parallel region.
// `work` is an estimate of the fp32 operations to do; too little to share is done by the calling thread.
template <typename Body>
void run_team(double work, Body&& body) {
    int threads = omp_in_parallel() ? 1 : omp_get_max_threads();
    if (work < 2e5) threads = 1;
    struct Call {
        Team team;
        std::remove_reference_t<Body>* body;
    } call{Team(threads), &body};
    if (threads == 1) {
        body(call.team);
        leave_tiles();
        return;
    }
    GOMP_parallel(
        [](void* data) {
            Call& shared = *static_cast<Call*>(data);
            // Fewer threads than asked for would wait for ever at the first barrier.
            if (omp_get_num_threads() == shared.team.size()) {
                (*shared.body)(shared.team);
            } else if (omp_get_thread_num() == 0) {
                Team alone(1);
                (*shared.body)(alone);
            }
            leave_tiles();
        },
        &call, unsigned(threads), 0);
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
