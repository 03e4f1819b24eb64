// Cross-entropy of a linear layer's output, with both gradients, the logits never in memory.
//
// Tokens are worked on in groups, whose probabilities stay in the caches. Lanes are tokens in the first two products, so
// that the weights are read as they lie. A chunk of rows of the vocabulary leaves its product as exponentials relative to
// the chunk's own maximum, in bf16: one exponential for every logit. What brings them to the token's maximum and sum is
// known after the last chunk, and is a factor for each chunk and token.
#pragma once

#include <algorithm>
#include <cfloat>

#include "cross_entropy.h"
#include "gemm_bf16.h"
#include "transpose.h"

namespace moesaic {

struct LinearCrossEntropy {
    const bf16* hidden;      // (T, H), H a multiple of 32
    const bf16* weight;      // (V, H), V a multiple of 32
    const int64_t* targets;  // (T,), each in [0, V) or kIgnoredTarget
    int64_t tokens, size, vocabulary;
    float* losses;       // (T,)
    bf16* grad_hidden;   // (T, H), of the sum of the losses; null: losses only
    float* grad_weight;  // (V, H), as well; null: none

    static constexpr int kChunk = 96;  // rows that one product works on: whole row blocks everywhere
    static constexpr int64_t kDepth = 512;  // terms summed at once: a panel of so many pairs stays in the first-level cache
    static constexpr int kBlocks = 4;        // blocks of 32 tokens of one task of the hidden states' gradient

    // Tokens of a group: what keeps its probabilities within 8 MiB, and enough to make up for one more pass over
    // grad_weight; a multiple of kBlocks blocks.
    int64_t group() const { return std::clamp<int64_t>((1 << 22) / vocabulary / 128 * 128, 512, 1024); }
    // Strides of whole pages would put the rows of a product's operand into the same few sets of a cache.
    int64_t row_stride() const { return group() + 32; }
    int64_t turned_stride() const { return vocabulary + 32; }
    int64_t chunks() const { return (vocabulary + kChunk - 1) / kChunk; }
};

struct LinearCrossEntropyScratch {
    bf16* weight_turned;        // (H, turned_stride)
    uint32_t* lanes;            // by block of 32 tokens (H / 2, 32)
    uint32_t* pairs;            // by panel of 32 columns of H (G / 2, 32)
    bf16* rows;                 // (V, row_stride): exponentials, then the gradient of the logits
    uint32_t* gradient_pairs;   // by block of 32 tokens (V / 2, 32): the same once more
    float *tops, *sums;         // (chunks, G)
    float *at_target, *top, *inverse;  // (G,); inverse is 0 where nothing is to predict

    // The floats that all of them take together; sets the pointers if base is given.
    size_t place(const LinearCrossEntropy& a, float* base) {
        const size_t group = size_t(a.group()), size = size_t(a.size), vocabulary = size_t(a.vocabulary);
        size_t used = 0;
        const auto take = [&](size_t count) {
            float* here = base ? base + used : nullptr;
            used += (count + 15) / 16 * 16;
            return here;
        };
        lanes = reinterpret_cast<uint32_t*>(take(group * size / 2));
        tops = take(group * size_t(a.chunks()));
        sums = take(group * size_t(a.chunks()));
        at_target = take(group);
        top = take(group);
        inverse = take(group);
        if (!a.grad_hidden) return used;
        weight_turned = reinterpret_cast<bf16*>(take(size * size_t(a.turned_stride()) / 2));
        if (a.grad_weight) pairs = reinterpret_cast<uint32_t*>(take(group * size / 2));
        rows = reinterpret_cast<bf16*>(take(size_t(a.row_stride()) * vocabulary / 2));
        gradient_pairs = reinterpret_cast<uint32_t*>(take(group * vocabulary / 2));
        return used;
    }
};

inline void linear_cross_entropy(Team& team, const LinearCrossEntropy& a, const LinearCrossEntropyScratch& s) {
    constexpr int kChunk = LinearCrossEntropy::kChunk, kBlocks = LinearCrossEntropy::kBlocks;
    const int64_t size = a.size, vocabulary = a.vocabulary, group = a.group(), chunks = a.chunks();
    const int64_t stride = a.row_stride(), turned_stride = a.turned_stride();
    if (a.grad_hidden)
        team.tasks(vocabulary / 32, [&](long task) {
            thread_local Scratch own;
            uint32_t* interleaved = own.get<uint32_t>(size_t(16 * size));
            const bf16* from = a.weight + task * 32 * size;
            for (int p = 0; p < 16; ++p)
                interleave_rows(int(size), from + 2 * p * size, from + (2 * p + 1) * size, interleaved + p * size);
            transpose_dwords(16, int(size), interleaved, size_t(size),
                             reinterpret_cast<uint32_t*>(s.weight_turned) + task * 16, size_t(turned_stride / 2));
        });
    for (int64_t first = 0; first < a.tokens; first += group) {
        const int64_t here = std::min(group, a.tokens - first), blocks = (here + 31) / 32;
        const auto target_of = [&](int64_t lane) { return lane < here ? a.targets[first + lane] : kIgnoredTarget; };
        team.tasks(blocks, [&](long block) {
            thread_local Scratch own;
            bf16* rows = own.get<bf16>(size_t(32 * size));
            const int64_t valid = std::min<int64_t>(32, here - block * 32);
            std::memcpy(rows, a.hidden + (first + block * 32) * size, size_t(valid * size) * sizeof(bf16));
            std::memset(rows + valid * size, 0, size_t((32 - valid) * size) * sizeof(bf16));
            transpose_dwords(32, int(size / 2), reinterpret_cast<uint32_t*>(rows), size_t(size / 2),
                             s.lanes + block * 16 * size, 32);
            if (!a.grad_weight) return;
            for (int64_t panel = 0; panel < size / 32; ++panel)
                for (int p = 0; p < 16; ++p)
                    interleave_rows(32, rows + 2 * p * size + panel * 32, rows + (2 * p + 1) * size + panel * 32,
                                    s.pairs + (panel * (group / 2) + block * 16 + p) * 32);
        });
        team.tasks(chunks, [&](long chunk) {
            alignas(64) float logits[kChunk * 32];
            const int64_t row = chunk * kChunk;
            const int count = int(std::min<int64_t>(kChunk, vocabulary - row));
            thread_local Scratch own;
            const LeftRows left = left_rows(a.weight + row * size, size_t(size), count, size, own);
            for (int64_t block = 0; block < blocks; ++block) {
                gemm<32>(count, int(size / 2), left.rows, left.ld, s.lanes + block * 16 * size, 32, logits, 32, false);
                for (int64_t lane = block * 32; lane < block * 32 + 32; ++lane) {
                    const int64_t target = target_of(lane) - row;
                    if (uint64_t(target) < uint64_t(count)) s.at_target[lane] = logits[target * 32 + lane % 32];
                }
                for (int lane = 0; lane < 32; lane += W) {
                    Vf top = load(logits + lane), sum[2] = {zero(), zero()};
                    for (int r = 1; r < count; ++r) top = max(top, load(logits + r * 32 + lane));
                    top = max(top, set1(-FLT_MAX));  // a row of -infinity has no maximum to subtract
                    bf16* out = a.grad_hidden ? s.rows + row * stride + block * 32 + lane : nullptr;
                    for (int r = 0; r < count; ++r) {
                        const Vf value = exp(sub(load(logits + r * 32 + lane), top));
                        sum[r % 2] = add(sum[r % 2], value);
                        if (out) store_bf16(out + r * stride, value);
                    }
                    store(s.tops + chunk * group + block * 32 + lane, top);
                    store(s.sums + chunk * group + block * 32 + lane, add(sum[0], sum[1]));
                }
            }
        });
        team.tasks(blocks, [&](long block) {
            for (int64_t lane = block * 32; lane < block * 32 + 32; ++lane) {
                const bool ignored = target_of(lane) == kIgnoredTarget;
                float top = s.tops[lane], sum = 0.0f;
                for (int64_t chunk = 1; chunk < chunks; ++chunk) top = std::max(top, s.tops[chunk * group + lane]);
                for (int64_t chunk = 0; chunk < chunks; ++chunk)
                    sum += s.sums[chunk * group + lane] * std::exp(s.tops[chunk * group + lane] - top);
                s.top[lane] = top;
                s.inverse[lane] = ignored ? 0.0f : 1.0f / sum;
                if (lane < here) a.losses[first + lane] = ignored ? 0.0f : top - s.at_target[lane] + std::log(sum);
            }
        });
        if (!a.grad_hidden) continue;
        team.tasks(chunks, [&](long chunk) {
            const int64_t row = chunk * kChunk;
            const int count = int(std::min<int64_t>(kChunk, vocabulary - row));
            for (int64_t block = 0; block < blocks; ++block) {
                uint32_t* pairs = s.gradient_pairs + (block * (vocabulary / 2) + row / 2) * 32;
                for (int lane = 0; lane < 32; lane += W) {
                    const int64_t at = block * 32 + lane;
                    const Vf inverse = load(s.inverse + at);
                    const Vf factor = mul(exp(sub(load(s.tops + chunk * group + at), load(s.top + at))), inverse);
                    bf16* values = s.rows + row * stride + at;
                    for (int r = 0; r < count; r += 2) {
                        Vf even = mul(load_bf16(values + r * stride), factor);
                        Vf odd = mul(load_bf16(values + (r + 1) * stride), factor);
                        store_bf16(values + r * stride, even);
                        store_bf16(values + (r + 1) * stride, odd);
                        storei(pairs + r / 2 * 32 + lane, interleave_bf16(even, odd));
                    }
                }
                for (int64_t lane = block * 32; lane < block * 32 + 32; ++lane) {
                    const int64_t target = target_of(lane);
                    const auto write = [&](int64_t v, float value) {
                        s.rows[v * stride + lane] = float_to_bf16(value);
                        reinterpret_cast<bf16*>(pairs)[((v - row) / 2 * 32 + lane % 32) * 2 + (v & 1)] =
                            float_to_bf16(value);
                    };
                    // 0 times what may be infinite is not 0.
                    if (target == kIgnoredTarget)
                        for (int64_t v = row; v < row + count; ++v) write(v, 0.0f);
                    else if (uint64_t(target - row) < uint64_t(count))
                        write(target, std::exp(s.at_target[lane] - s.top[lane]) * s.inverse[lane] - 1.0f);
                }
            }
        });
        const int64_t columns = (size + kChunk - 1) / kChunk, shares = (blocks + kBlocks - 1) / kBlocks;
        team.tasks(columns * shares, [&](long task) {
            thread_local Scratch own;
            float* sums = own.get<float>(size_t(kBlocks + 1) * kChunk * 32);
            float* turned = sums + kBlocks * kChunk * 32;
            const int64_t column = task % columns * kChunk, start = task / columns * kBlocks;
            const int count = int(std::min<int64_t>(kChunk, size - column));
            const int64_t end = std::min(start + kBlocks, blocks);
            thread_local Scratch rows;
            for (int64_t v = 0; v < vocabulary; v += LinearCrossEntropy::kDepth) {
                const int64_t depth = std::min(LinearCrossEntropy::kDepth, vocabulary - v);
                const LeftRows left = left_rows(s.weight_turned + column * turned_stride + v, size_t(turned_stride), count,
                                                depth, rows);
                for (int64_t block = start; block < end; ++block)
                    gemm<32>(count, int(depth / 2), left.rows, left.ld,
                             s.gradient_pairs + (block * (vocabulary / 2) + v / 2) * 32, 32,
                             sums + (block - start) * kChunk * 32, 32, v > 0);
            }
            for (int64_t block = start; block < end; ++block) {
                transpose_dwords(count, 32, reinterpret_cast<uint32_t*>(sums + (block - start) * kChunk * 32), 32,
                                 reinterpret_cast<uint32_t*>(turned), kChunk);
                for (int64_t lane = 0; lane < std::min<int64_t>(32, here - block * 32); ++lane)
                    for (int c = 0; c < count; c += W)
                        store_bf16(a.grad_hidden + (first + block * 32 + lane) * size + column + c,
                                   load(turned + lane * kChunk + c));
            }
        });
        if (!a.grad_weight) continue;
        team.tasks(chunks, [&](long chunk) {
            const int64_t row = chunk * kChunk;
            const int count = int(std::min<int64_t>(kChunk, vocabulary - row));
            thread_local Scratch own;
            // All terms of some columns at a time, or where rows are expanded some terms of all columns.
            const int64_t columns_at_once = kExpandsRows ? size : 32;
            for (int64_t start = 0; start < size; start += columns_at_once)
                for (int64_t token = 0; token < blocks * 32; token += LinearCrossEntropy::kDepth) {
                    const int64_t depth = std::min(LinearCrossEntropy::kDepth, blocks * 32 - token);
                    const LeftRows left = left_rows(s.rows + row * stride + token, size_t(stride), count, depth, own);
                    for (int64_t column = start; column < start + columns_at_once; column += 32)
                        gemm<32>(count, int(depth / 2), left.rows, left.ld, s.pairs + (column * group + token * 32) / 2, 32,
                                 a.grad_weight + row * size + column, size_t(size), first + token > 0);
                }
        });
    }
}

}  // namespace moesaic
