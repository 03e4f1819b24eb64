// What this machine can do at most with the instructions that the kernels use: reading memory, and sums of products whose
// operands never leave the registers or tiles. kernels/limits.py takes the time.

#include "export.h"
#include "gemm_int8.h"
#include "parallel.h"
#include "simd.h"
#include "tiles.h"

namespace moesaic {
namespace {

// Enough independent sums to fill the pipelines: latency 4, two units. With the two operands they fit in 16 registers.
constexpr int kSums = 12;
// Shares of the work that a free thread takes, so that one thread pushed off its core does not decide the time.
constexpr long kTasksPerThread = 16;
// Several places at once, so that more loads are under way than in one stream: 41 GB/s against 36 on two cores of an
// AMD EPYC VM (medians in turn), where software prefetching gained nothing.
constexpr size_t kReadBlock = 4 << 20;
constexpr int kStreams = 8;

// The compiler must neither know the value nor drop what was computed.
#if defined(MOESAIC_EMULATE_AVX512)
inline void hide(Vf& x) { asm volatile("" : "+m"(x.v)); }
inline void hide(Vi& x) { asm volatile("" : "+m"(x.v)); }
#else
inline void hide(Vf& x) { asm volatile("" : "+x"(x.v)); }
inline void hide(Vi& x) { asm volatile("" : "+x"(x.v)); }
#endif

void read_block(const char* from, size_t bytes) {
    Vf sums[kStreams];
    for (auto& sum : sums) sum = zero();
    const size_t part = bytes / kStreams / 256 * 256;
    for (size_t i = 0; i < part; i += 256)
        for (int stream = 0; stream < kStreams; ++stream)
            for (int line = 0; line < 256; line += 4 * W)
                sums[stream] =
                    add(sums[stream], load(reinterpret_cast<const float*>(from + stream * part + i + line)));
    for (auto& sum : sums) hide(sum);
}

// One call of `step` is one round of independent products.
template <typename Step>
int64_t count_operations(int64_t rounds, int64_t operations_per_round, Step&& step) {
    int64_t done = 0;
    run_team(1e12, [&](Team& team) {
        const long tasks = kTasksPerThread * team.size();
        team.tasks(tasks, [&](long task) {
            step(rounds);
            if (task == 0) done = tasks * rounds * operations_per_round;
        });
    });
    return done;
}

#if defined(MOESAIC_TILES)

// All four tiles of sums, as a product of 32 rows and 32 columns uses them.
template <typename Dot>
void tile_rounds(int64_t rounds, Dot&& dot) {
    // Not zeros: with numbers as they come, tiles take a fifth longer. 0.75 as bf16, 63 as int8.
    alignas(64) uint8_t numbers[16 * 64];
    std::memset(numbers, 0x3f, sizeof numbers);
    configure_tiles(16, 16);
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    tile_load(4, numbers, 64);
    tile_load(5, numbers, 64);
    tile_load(6, numbers, 64);
    for (int64_t round = 0; round < rounds; ++round) dot();
}

void bf16_rounds(int64_t rounds) {
    tile_rounds(rounds, [] {
        tile_dot_bf16(0, 4, 6);
        tile_dot_bf16(2, 5, 6);
        tile_dot_bf16(1, 4, 6);
        tile_dot_bf16(3, 5, 6);
    });
}

void int8_rounds(int64_t rounds) {
    tile_rounds(rounds, [] {
        tile_dot_s8u8(0, 4, 6);
        tile_dot_s8u8(2, 5, 6);
        tile_dot_s8u8(1, 4, 6);
        tile_dot_s8u8(3, 5, 6);
    });
}

constexpr int64_t kBf16Operations = 4 * 2 * 16 * 16 * 32;
constexpr int64_t kInt8Operations = 4 * 2 * 16 * 16 * 64;

#else

void bf16_rounds(int64_t rounds) {
    Vi a = set1i(0x3f803f80), b = set1i(0x3a803a80);  // 1 and 2^-10
    hide(a);
    hide(b);
    Vf sums[kSums];
    for (auto& sum : sums) sum = zero();
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) sum = dot_bf16(sum, a, b);
    for (auto& sum : sums) hide(sum);
}

// One instruction where the processor has VNNI, on AVX2 four.
inline Vi dot_int8(Vi acc, Vi a, Vi b) {
#if defined(__AVX512F__)
    return {_mm512_dpbusd_epi32(acc.v, a.v, b.v)};
#else
    SignedWeights{b, b}.add_to(acc, a, a);
    return acc;
#endif
}

void int8_rounds(int64_t rounds) {
    Vi a = set1i(0x00010001), b = set1i(0x00010001);
    hide(a);
    hide(b);
    Vi sums[kSums];
    for (auto& sum : sums) sum = set1i(0);
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) {
            sum = dot_int8(sum, a, b);
            hide(a);  // or the compiler takes the product out of the loop
        }
    for (auto& sum : sums) hide(sum);
}

constexpr int64_t kBf16Operations = int64_t(kSums) * 2 * W * 2;
constexpr int64_t kInt8Operations = int64_t(kSums) * 2 * W * 4;

#endif

void fp32_rounds(int64_t rounds) {
    Vf a = set1(1.0f), b = set1(0.001f);
    hide(a);
    hide(b);
    Vf sums[kSums];
    for (auto& sum : sums) sum = zero();
    for (int64_t round = 0; round < rounds; ++round)
        for (auto& sum : sums) sum = fma(a, b, sum);
    for (auto& sum : sums) hide(sum);
}

}  // namespace
}  // namespace moesaic

// Each reads, or does `rounds` times per task, and returns how many bytes were read or operations done (a multiplication
// and an addition are two).

MOESAIC_EXPORT int64_t moesaic_limit_read(const char* from, int64_t bytes) try {
    using namespace moesaic;
    const long blocks = bytes / int64_t(kReadBlock);
    run_team(1e12, [&](Team& team) {
        team.tasks(blocks, [&](long block) { read_block(from + block * kReadBlock, kReadBlock); });
    });
    return blocks * int64_t(kReadBlock);
} MOESAIC_NO_MEMORY

MOESAIC_EXPORT int64_t moesaic_limit_bf16(int64_t rounds) try {
    return moesaic::count_operations(rounds, moesaic::kBf16Operations, moesaic::bf16_rounds);
} MOESAIC_NO_MEMORY

MOESAIC_EXPORT int64_t moesaic_limit_int8(int64_t rounds) try {
    return moesaic::count_operations(rounds, moesaic::kInt8Operations, moesaic::int8_rounds);
} MOESAIC_NO_MEMORY

MOESAIC_EXPORT int64_t moesaic_limit_fp32(int64_t rounds) try {
    return moesaic::count_operations(rounds, int64_t(moesaic::kSums) * 2 * moesaic::W, moesaic::fp32_rounds);
} MOESAIC_NO_MEMORY

// What four products of tiles take on this thread now, in ticks, with seven tiles in use and with four (TileSharing). 0
// without tiles.
MOESAIC_EXPORT int64_t moesaic_limit_tile_ways(double* seven, double* few) try {
    using namespace moesaic;
#if defined(MOESAIC_TILES) && !defined(MOESAIC_EMULATE_TILES)
    const TileSharing::Ticks ticks = TileSharing::try_both();
    leave_tiles();
    *seven = double(ticks.seven) / TileSharing::kTimes;
    *few = double(ticks.few) / TileSharing::kTimes;
    return 1;
#else
    *seven = *few = 0.0;
    return 0;
#endif
} MOESAIC_NO_MEMORY
