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
#include <thread>
#include <vector>

namespace moesaic {

class ExpertReader {
  public:
    struct Region {
        const uint8_t* from;
        size_t bytes;
    };

    // The one of this process: the disk is one as well. Its threads start with the first word that is left.
    static ExpertReader& instance() {
        static ExpertReader reader;
        return reader;
    }

    // A number for the layer that the team has reached, counted over all layers of all passes.
    uint64_t reach_next() { return turn_.fetch_add(1, std::memory_order_relaxed) + 1; }

    // What is likely to be read when the team has reached `turn`; earlier words are forgotten.
    void want(uint64_t turn, const std::vector<Region>& regions) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (threads_.empty())
                for (int i = 0; i < kThreads; ++i) threads_.emplace_back([this] { read(); });
            wanted_.clear();
            for (const Region& region : regions) wanted_.push_back({turn, region});
        }
        wake_.notify_all();
    }

    ~ExpertReader() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
        }
        wake_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

  private:
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
                wake_.wait(lock, [&] { return ends_ || !wanted_.empty(); });
                if (ends_) return;
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

    static void bring(uintptr_t at, uintptr_t stop) {
#if defined(__linux__)
        constexpr int kPopulateRead = 22;  // MADV_POPULATE_READ, since Linux 5.14
        if (madvise(reinterpret_cast<void*>(at), stop - at, kPopulateRead) == 0) return;
#endif
        for (; at < stop; at += kPage) (void)*reinterpret_cast<const volatile uint8_t*>(at);
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Wanted> wanted_;
    std::vector<std::thread> threads_;
    std::atomic<uint64_t> turn_{0};
    bool ends_ = false;
};

}  // namespace moesaic
