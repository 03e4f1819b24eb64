// Reading experts of a mapped file before they are needed, for models that do not fit into memory.
//
// Threads of its own fault the pages in, whole huge pages where the file has them, while the team computes: a madvise
// that does not wait (MADV_WILLNEED) would read small pages, which then stay mapped as such. The team only leaves word
// and never waits for them. What is late is dropped: the team reads it itself by then.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace moesaic {

class ExpertReader {
  public:
    struct Region {
        const uint8_t* from;
        size_t bytes;
    };

    // The one of this process: the disk is one as well. Its threads start with the first word that is left, and end with
    // the process; it is never destroyed, since they may still be at it then (and are not there in a forked child).
    static ExpertReader& instance() {
        static ExpertReader* reader = new ExpertReader;
        return *reader;
    }

    // A number for the layer that the team has reached, counted over all layers of all passes.
    uint64_t reach_next() { return turn_.fetch_add(1, std::memory_order_relaxed) + 1; }

    // What is likely to be read when the team has reached `turn`; earlier words are forgotten. A word that would have to
    // wait is not left.
    void want(uint64_t turn, const std::vector<Region>& regions) {
        {
            const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
            if (!lock.owns_lock()) return;
            try {
                for (; num_threads_ < kThreads; ++num_threads_) std::thread([this] { read(); }).detach();
            } catch (const std::system_error&) {  // a limit on threads; reading ahead is a help, no more
            }
            wanted_.clear();
            for (const Region& region : regions) wanted_.push_back({turn, region});
        }
        wake_.notify_all();
    }

  private:
    ExpertReader() = default;

    struct Wanted {
        uint64_t turn;
        Region region;
    };
    static constexpr int kThreads = 2;
    static constexpr size_t kBlock = size_t(2) << 20, kPage = 4096;

    void read() {
        for (;;) {
            Wanted wanted;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return !wanted_.empty(); });
                wanted = wanted_.front();
                wanted_.pop_front();
            }
            const auto begin = reinterpret_cast<uintptr_t>(wanted.region.from) / kPage * kPage;
            const uintptr_t end = reinterpret_cast<uintptr_t>(wanted.region.from) + wanted.region.bytes;
            for (uintptr_t at = begin; at < end; at = (at / kBlock + 1) * kBlock) {
                if (turn_.load(std::memory_order_relaxed) >= wanted.turn) break;
                const uintptr_t stop = (at / kBlock + 1) * kBlock < end ? (at / kBlock + 1) * kBlock : end;
                bring(at, stop);
            }
        }
    }

    // Faults pages in without touching them: should the model be gone by now, this fails, where a read would end the
    // process. Before Linux 5.14, and elsewhere, nothing is brought.
    static void bring(uintptr_t at, uintptr_t stop) {
#if defined(__linux__)
        constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ
        madvise(reinterpret_cast<void*>(at), stop - at, kPopulateRead);
#else
        (void)at, (void)stop;
#endif
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Wanted> wanted_;
    int num_threads_ = 0;
    std::atomic<uint64_t> turn_{0};
};

}  // namespace moesaic
