// Rows of scores (logits, or what penalties leave of them): drawing a token among those that top_k, top_p and min_p
// leave, and the log of the sum with the likeliest tokens. kernels/sampling.py says what is computed.
//
// With top_k and min_p only the weights of the few tokens that are left are made: a block's largest score tells whether
// any of its tokens are. One thread does a row, in an order that depends on nothing else.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>

#include "parallel.h"
#include "simd.h"

namespace moesaic {

// All members are of 8 bytes: Python fills these structs.
struct RowDraw {
    const float* scores;  // (V)
    int64_t best;         // the first of the largest, which is finite
    int64_t top_k;        // 0 for all
    double temperature, top_p, min_p, uniform;
    int64_t token;  // what is drawn; -1 where the definition has to decide
};

class ScoreRow {
  protected:
    static constexpr int64_t kBlock = 64;   // scores whose sum of weights, or largest, is kept
    static constexpr int64_t kMost = 4096;  // so many tokens at most are looked at one by one
    static constexpr float kNothing = -std::numeric_limits<float>::infinity();

    ScoreRow(const float* scores, int64_t size, double temperature, Scratch& scratch)
        : scores_(scores),
          size_(size),
          blocks_((size + kBlock - 1) / kBlock),
          scale_(1.44269504088896341f / float(temperature)) {
        sums_ = scratch.get<double>(size_t(2 * blocks_ + kMost + kMost / 2));
        tops_ = reinterpret_cast<float*>(sums_ + blocks_);
        falling_ = tops_ + blocks_;
        places_ = reinterpret_cast<int64_t*>(sums_ + 2 * blocks_);
        weights_ = reinterpret_cast<float*>(places_ + kMost);
    }

    int64_t begin(int64_t block) const { return block * kBlock; }
    int64_t end(int64_t block) const { return std::min(begin(block) + kBlock, size_); }
    Vf weigh(Vf scores) const { return exp2_of_negative(mul(sub(scores, set1(largest_)), set1(scale_))); }

    // Calls body(vector, its place) for a block, -infinity behind the last score.
    template <typename Body>
    void each_vector(int64_t block, Body&& body) const {
        const int64_t last = end(block);
        int64_t i = begin(block);
        if (last - i == kBlock) {
#pragma GCC unroll 16
            for (int64_t k = 0; k < kBlock; k += W) body(load(scores_ + i + k), i + k);
            return;
        }
        for (; i + W <= last; i += W) body(load(scores_ + i), i);
        if (i == last) return;
        alignas(64) float rest[W];
        std::fill(rest, rest + W, kNothing);
        std::memcpy(rest, scores_ + i, size_t(last - i) * sizeof(float));
        body(load(rest), i);
    }

    // Find the sum of weights of each block, or its largest score, or both; returns the sum of all weights.
    template <bool WithSums, bool WithTops>
    double look_through() {
        double total = 0;
        for (int64_t block = 0; block < blocks_; ++block) {
            Vf own = zero(), top = set1(kNothing);
            each_vector(block, [&](Vf x, int64_t) {
                if constexpr (WithSums) own = add(own, weigh(x));
                if constexpr (WithTops) top = max(top, x);
            });
            if constexpr (WithSums) total += sums_[block] = double(sum(own));
            if constexpr (WithTops) tops_[block] = maximum(top);
        }
        return total;
    }

    // The rest of these need the blocks' largest.

    // Keep the tokens with scores of at least `bound`, in their order; returns how many, -1 for too many.
    int64_t keep_from(float bound) {
        int64_t count = 0;
        for (int64_t block = 0; block < blocks_; ++block) {
            if (tops_[block] < bound) continue;
            for (int64_t i = begin(block); i < end(block); ++i) {
                if (scores_[i] < bound) continue;
                if (count == kMost) return -1;
                places_[count++] = i;
            }
        }
        return count;
    }

    // Keep so many tokens, from the largest score down, the first of equals first; false where they are too many.
    bool keep_largest(int64_t count) {
        if (2 * count > blocks_) return false;
        std::copy(tops_, tops_ + blocks_, falling_);
        std::nth_element(falling_, falling_ + count - 1, falling_ + blocks_, std::greater<float>());
        // So many blocks have a score that is at least as large.
        const int64_t found = keep_from(falling_[count - 1]);
        if (found < 0) return false;
        sort(found);
        return true;
    }

    // From the largest score down, the first of equals first: by one key, whose upper half falls as scores rise.
    void sort(int64_t count) {
        auto* keys = reinterpret_cast<uint64_t*>(places_);
        for (int64_t i = 0; i < count; ++i) {
            const float score = scores_[places_[i]] + 0.0f;  // -0 becomes 0, its equal
            uint32_t bits;
            std::memcpy(&bits, &score, sizeof(bits));
            keys[i] = uint64_t(bits >> 31 ? bits : bits ^ 0x7fffffffu) << 32 | uint64_t(places_[i]);
        }
        std::sort(keys, keys + count);
        for (int64_t i = 0; i < count; ++i) places_[i] = int64_t(keys[i] & 0xffffffffu);
    }

    const float* const scores_;
    const int64_t size_, blocks_;
    const float scale_;  // to powers of 2
    float largest_ = 0;  // of the scores
    double* sums_;       // of each block
    float* tops_;        // the largest of each block
    float* falling_;     // the same in another order
    int64_t* places_;    // of the tokens that are kept
    float* weights_;     // of these
};

class Draw : ScoreRow {
  public:
    Draw(const RowDraw& draw, int64_t size, Scratch& scratch)
        : ScoreRow(draw.scores, size, draw.temperature, scratch), a_(draw), min_p_(float(draw.min_p)) {
        largest_ = scores_[draw.best];
    }

    // The token; -1 where many tokens are left, or more than those that are sure to be looked at reach top_p, none has a
    // weight, or fp32 cannot divide by the temperature.
    int64_t token() {
        if (!(a_.temperature > 1e-30 && a_.temperature < 1e30)) return -1;
        const bool has_top_k = a_.top_k > 0 && a_.top_k < size_;
        if (!has_top_k && a_.top_p >= 1.0 && min_p_ <= 0.0f) return among_all();
        const int64_t count = has_top_k ? keep_top_k() : a_.top_p < 1.0 ? keep_share() : keep_weighty();
        return count < 0 ? -1 : among(count, has_top_k);
    }

  private:
    struct Place {
        int64_t index;  // -1 where nothing has a weight
        double inside;  // what of the goal is left to it
    };

    // Where the running sum passes a goal; by rounding it may not, and then the last that has a weight.
    template <typename T>
    static Place find(const T* weights, int64_t count, double goal) {
        Place last{-1, 0};
        double running = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (weights[i] > 0) last = {i, goal - running};
            running += double(weights[i]);
            if (running > goal) break;
        }
        return last;
    }

    int64_t among_all() {
        const double total = look_through<true, false>();
        const Place block = find(sums_, blocks_, a_.uniform * total);
        if (block.index < 0) return -1;
        alignas(64) float own[kBlock];
        const int64_t first = begin(block.index);
        each_vector(block.index, [&](Vf x, int64_t at) { store(own + at - first, weigh(x)); });
        return first + find(own, end(block.index) - first, block.inside).index;
    }

    int64_t keep_top_k() {
        look_through<false, true>();
        return keep_largest(a_.top_k) ? a_.top_k : -1;
    }

    int64_t keep_weighty() {
        look_through<false, true>();
        return keep_weights_from(min_p_);
    }

    // The fewest of the largest scores whose weights reach the share top_p of all, in their order.
    int64_t keep_share() {
        constexpr double kSure = 3.4e-4;  // e^-8: a sure model's share lies far above
        const double goal = a_.top_p * look_through<true, true>();
        const int64_t count = keep_weights_from(kSure);
        if (count < 0) return -1;
        sort(count);
        weigh_kept(count);
        const int64_t kept = reach(goal, count);
        if (kept < 0) return -1;
        std::sort(places_, places_ + kept);
        return kept;
    }

    // Keep all tokens whose weights are above `weight`, and some below it.
    int64_t keep_weights_from(double weight) {
        const double largest = largest_, slack = 1e-3 * a_.temperature + 1e-6 * std::abs(largest);
        const double bound = largest + std::log(weight) * a_.temperature - slack;
        return bound > -1e38 ? keep_from(float(bound)) : -1;
    }

    // How many of the kept tokens' weights come to `goal`; -1 where all do not.
    int64_t reach(double goal, int64_t count) const {
        double through = 0;
        for (int64_t i = 0; i < count; ++i)
            if ((through += double(weights_[i])) >= goal) return i + 1;
        return -1;
    }

    void weigh_kept(int64_t count) {
        for (int64_t i = 0; i < count; ++i) weights_[i] = scores_[places_[i]];
        std::fill(weights_ + count, weights_ + (count + W - 1) / W * W, kNothing);
        for (int64_t i = 0; i < count; i += W) store(weights_ + i, weigh(load(weights_ + i)));
    }

    // Choose among the kept tokens; of the top_k, which are falling, those that reach top_p of their sum.
    int64_t among(int64_t count, bool is_top_k) {
        weigh_kept(count);
        if (is_top_k && a_.top_p < 1.0) count = reach(a_.top_p * sum_kept(count), count);
        if (count < 0) return -1;
        for (int64_t i = 0; i < count; ++i)
            if (weights_[i] < min_p_) weights_[i] = 0;
        const int64_t place = find(weights_, count, a_.uniform * sum_kept(count)).index;
        return place < 0 ? -1 : places_[place];
    }

    double sum_kept(int64_t count) const {
        double total = 0;
        for (int64_t i = 0; i < count; ++i) total += double(weights_[i]);
        return total;
    }

    const RowDraw& a_;
    const float min_p_;
};

class LogTotal : ScoreRow {
  public:
    LogTotal(const float* scores, int64_t size, Scratch& scratch) : ScoreRow(scores, size, 1.0, scratch) {}

    // The log of the sum of e to the scores, and in `likeliest` the `top` largest, the first of equals first. NaN where
    // not all scores are finite, or so many are too many: then the definition decides.
    double value(int64_t top, int64_t* likeliest) {
        Vf broken = zero();
        for (int64_t block = 0; block < blocks_; ++block) {
            Vf own = set1(kNothing);
            each_vector(block, [&](Vf x, int64_t at) {
                own = max(own, x);
                if (at + W <= size_) broken = fma(x, zero(), broken);
            });
            tops_[block] = maximum(own);
        }
        for (int64_t i = size_ / W * W; i < size_; ++i) broken = fma(set1(scores_[i]), zero(), broken);
        constexpr double kUndecided = std::numeric_limits<double>::quiet_NaN();
        if (std::isnan(sum(broken))) return kUndecided;
        largest_ = *std::max_element(tops_, tops_ + blocks_);
        if (top > 0) {
            if (!keep_largest(top)) return kUndecided;
            std::copy(places_, places_ + top, likeliest);
        }
        return double(largest_) + std::log(look_through<true, false>());
    }
};

// Every thread of the team calls these, with equal arguments.

inline void draw_rows(Team& team, RowDraw* draws, int64_t count, int64_t size) {
    static thread_local Scratch scratch;
    team.tasks(long(count), [&](long i) { draws[i].token = Draw(draws[i], size, scratch).token(); });
}

// totals (R) and likeliest (R, top) of scores (R, V).
inline void total_rows(Team& team, const float* scores, int64_t rows, int64_t size, int64_t top, double* totals,
                       int64_t* likeliest) {
    static thread_local Scratch scratch;
    team.tasks(long(rows), [&](long row) {
        totals[row] = LogTotal(scores + row * size, size, scratch).value(top, likeliest + row * top);
    });
}

}  // namespace moesaic
