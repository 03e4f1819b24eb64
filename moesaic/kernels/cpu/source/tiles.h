// AMX tiles behind functions with the tile's number as a constant argument.
//
// MOESAIC_TILES: the kernels are written for tiles. MOESAIC_EMULATE_TILES: there are none in this machine, and plain C++
// does what the instructions would, so that the kernels' tile paths are tested everywhere.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "simd.h"

#if defined(__AMX_TILE__) || defined(MOESAIC_EMULATE_TILES)
#define MOESAIC_TILES 1
#endif

namespace moesaic {

#if defined(MOESAIC_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
// Whether unsigned bytes are multiplied with signed ones and added up in 32 bits, by VNNI or tiles.
#if defined(__AVX512F__) || defined(MOESAIC_TILES)
constexpr bool kHasByteProducts = true;
#else
constexpr bool kHasByteProducts = false;
#endif

// What is streamed from memory is fetched into the second-level cache: with first-level ones of 32 KiB (Zen 4) int8
// weights come up to 1.5 times as fast so, tiles take int4 weights up to 25 % faster, and Zen 5 showed no difference.
// AVX2 alone (Zen 3) is faster with the first-level one, and little ahead (kAheadBytes).
inline void fetch(const void* p) {
#if defined(__AVX512F__)
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
#else
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
#endif
}

}  // namespace moesaic

#if defined(MOESAIC_TILES)

namespace moesaic {

// Tiles 0 to 3 hold sums, 4 and 5 rows of A, 6 columns of B; attention has uses of its own for them. The eighth stays empty,
// since few registers are left for the next loads as it is (TileSharing): with eight in use a product of operands in the
// caches takes half as long again.
struct alignas(64) TileShape {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

inline TileShape tile_shape(int top, int bottom) {
    TileShape shape;
    const int rows[] = {top, top, bottom, bottom, top, bottom, 16};
    for (int tile = 0; tile < 7; ++tile) {
        shape.rows[tile] = uint8_t(rows[tile]);
        shape.bytes_per_row[tile] = rows[tile] ? 64 : 0;
    }
    return shape;
}

#if defined(MOESAIC_EMULATE_TILES)

struct EmulatedTiles {
    TileShape shape;
    alignas(64) uint8_t data[8][16][64];
};
inline thread_local EmulatedTiles emulated;

// Where the instructions would end the process.
inline void require(bool is_lawful, const char* what) {
    if (is_lawful) return;
    std::fprintf(stderr, "emulated tiles: %s\n", what);
    std::abort();
}
inline void require_tile(int tile) {
    const TileShape& shape = emulated.shape;
    require(shape.palette == 1 && shape.rows[tile] > 0 && shape.bytes_per_row[tile] == 64, "a tile without a shape");
}
inline void require_product(int c, int a, int b) {
    for (const int tile : {c, a, b}) require_tile(tile);
    const auto& rows = emulated.shape.rows;
    require(rows[c] == rows[a] && rows[b] == 16 && c != a && c != b && a != b, "tiles that do not fit together");
}

inline void load_tile_shape(const TileShape& shape) {
    emulated.shape = shape;
    std::memset(emulated.data, 0, sizeof emulated.data);
}
inline void release_tiles() { emulated.shape = TileShape{}; }
inline void tile_zero(int tile) {
    require_tile(tile);
    std::memset(emulated.data[tile], 0, sizeof emulated.data[tile]);
}
inline void tile_load(int tile, const void* from, size_t stride) {
    require_tile(tile);
    for (int row = 0; row < emulated.shape.rows[tile]; ++row)
        std::memcpy(emulated.data[tile][row], static_cast<const char*>(from) + row * stride, 64);
}
inline void tile_load_once(int tile, const void* from, size_t stride) { tile_load(tile, from, stride); }
inline void tile_store(int tile, void* to, size_t stride) {
    require_tile(tile);
    for (int row = 0; row < emulated.shape.rows[tile]; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, emulated.data[tile][row], 64);
}
// The sums of even and of odd terms apart, as the instruction adds them; by vectors, since tests under sanitizers wait for
// it.
inline void tile_dot_bf16(int c, int a, int b) {
    constexpr int V = 16 / W;
    require_product(c, a, b);
    EmulatedTiles& tiles = emulated;
    const FlushedSubnormals flushed;
    for (int m = 0; m < tiles.shape.rows[c]; ++m) {
        Vf even[V], odd[V];
        for (int v = 0; v < V; ++v) even[v] = odd[v] = zero();
        for (int p = 0; p < 16; ++p) {
            const Vi row = broadcast_dword(tiles.data[a][m] + 4 * p);
            const Vf even_term = low_bf16(row), odd_term = high_bf16(row);
            for (int v = 0; v < V; ++v) {
                const Vi columns = loadi(tiles.data[b][p] + v * W * 4);
                even[v] = fma(even_term, low_bf16(columns), even[v]);
                odd[v] = fma(odd_term, high_bf16(columns), odd[v]);
            }
        }
        for (int v = 0; v < V; ++v) {
            float* sums = reinterpret_cast<float*>(tiles.data[c][m]) + v * W;
            store(sums, add(load(sums), add(even[v], odd[v])));
        }
    }
}
// Signed bytes of A times unsigned bytes of B, summed in int32, which wrap.
inline void tile_dot_s8u8(int c, int a, int b) {
    require_product(c, a, b);
    auto* sums = reinterpret_cast<uint32_t(*)[16]>(emulated.data[c]);
    auto* left = reinterpret_cast<int8_t(*)[64]>(emulated.data[a]);
    auto* right = reinterpret_cast<uint8_t(*)[64]>(emulated.data[b]);
    for (int m = 0; m < emulated.shape.rows[c]; ++m)
        for (int p = 0; p < 16; ++p)
            for (int n = 0; n < 16; ++n)
                for (int part = 0; part < 4; ++part)
                    sums[m][n] += uint32_t(int32_t(left[m][4 * p + part]) * int32_t(right[p][4 * n + part]));
}

#else

// Assembly and not the compiler's intrinsics: GCC before 11.5, 12.4 and 13.3 says of ldtilecfg that it reads 8 bytes, and
// drops the stores of the rest; older headers do not put their macros' arguments in brackets; and none says that a tile
// is loaded from memory. Macros, since a tile's number is part of the instruction.
inline void load_tile_shape(const TileShape& shape) { asm volatile("ldtilecfg %0" : : "m"(shape)); }
inline void release_tiles() { asm volatile("tilerelease" : :); }
#define tile_zero(tile) asm volatile("tilezero %%tmm" #tile : :)
#define tile_load(tile, from, stride)                            \
    asm volatile("tileloadd (%0,%1,1), %%tmm" #tile              \
                 :                                               \
                 : "r"(static_cast<const void*>(from)), "r"(ptrdiff_t(stride)) \
                 : "memory")
#define tile_load_once(tile, from, stride)                       \
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm" #tile            \
                 :                                               \
                 : "r"(static_cast<const void*>(from)), "r"(ptrdiff_t(stride)) \
                 : "memory")
#define tile_store(tile, to, stride)                             \
    asm volatile("tilestored %%tmm" #tile ", (%0,%1,1)"          \
                 :                                               \
                 : "r"(static_cast<void*>(to)), "r"(ptrdiff_t(stride)) \
                 : "memory")
#define tile_dot_bf16(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
#define tile_dot_s8u8(c, a, b) asm volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)

#endif

// The operand that stays in the first-level cache, or the one that goes past it.
#define tile_load_stays(stays, tile, from, stride) \
    do {                                           \
        if constexpr (stays)                       \
            tile_load(tile, from, stride);         \
        else                                       \
            tile_load_once(tile, from, stride);    \
    } while (0)

// Terms of 8 bits, or of bf16.
#define tile_dot(is_bytes, c, a, b)   \
    do {                              \
        if constexpr (is_bytes)       \
            tile_dot_s8u8(c, a, b);   \
        else                          \
            tile_dot_bf16(c, a, b);   \
    } while (0)

// Rows of tiles 0, 1 and 4, and of 2, 3 and 5, if they are in use. Loading a shape clears all tiles, and costs nothing when
// it is the same.
inline thread_local int tile_rows = -1;
inline void configure_tiles(int top, int bottom) {
    const int wanted = top * 32 + bottom;
    if (tile_rows != wanted) {
        load_tile_shape(tile_shape(top, bottom));
        tile_rows = wanted;
    }
}
// Tiles 0, 1 and 4 alone, whatever the others are.
inline void configure_top(int rows) {
    if (tile_rows / 32 != rows) configure_tiles(rows, 0);
}

// Whether this thread's products take few tiles at a time. Every tile that is loaded or summed to is a new register
// underneath, of which a core has few beyond those that hold something, and a neighbour on it that has tiles too, another
// program's or another thread of ours, takes half of them. Alone, four products take 28 ns either way on Emerald Rapids (44
// and 48 with an activation beside them); with such a neighbour 110 (147) where seven tiles are in use, and 68 (95) with
// four. Neighbours come and go within a second, so every thread tries both ways now and then.
class TileSharing {
  public:
    bool takes_few() const { return takes_few_; }
    void look() {
#if defined(MOESAIC_EMULATE_TILES)
        takes_few_ = !takes_few_;  // so that tests take both ways
#else
        if (++tasks_ % 8) return;  // to ask for the time takes 20 ns
        const uint64_t now = __rdtsc();
        if (now - last_ < kBetween) return;
        last_ = now;
        const Ticks ticks = try_both();
        takes_few_ = ticks.few + ticks.few / 8 < ticks.seven;
#endif
    }
#if !defined(MOESAIC_EMULATE_TILES)
    // What kTimes times four products take, with seven tiles in use and with four.
    struct Ticks {
        uint64_t seven, few;
    };
    static constexpr int kTimes = 16;
    static Ticks try_both() {
        // What a shape does not have holds nothing.
        configure_tiles(16, 16);
        const uint64_t seven = time([] {
            tile_load(4, zeros, 64);
            tile_load(6, zeros, 64);
            tile_dot_bf16(0, 4, 6);
            tile_load(5, zeros, 64);
            tile_dot_bf16(2, 5, 6);
            tile_load(6, zeros, 64);
            tile_dot_bf16(1, 4, 6);
            tile_dot_bf16(3, 5, 6);
        });
        configure_tiles(16, 0);
        const uint64_t few = time([] {
            for (int half = 0; half < 2; ++half) {
                tile_load(4, zeros, 64);
                tile_load(6, zeros, 64);
                tile_dot_bf16(0, 4, 6);
                tile_load(6, zeros, 64);
                tile_dot_bf16(1, 4, 6);
            }
        });
        return {seven, few};
    }
#endif

  private:
    static constexpr uint64_t kBetween = 1 << 23;  // ticks, some milliseconds; a look takes 2 to 5 us
#if !defined(MOESAIC_EMULATE_TILES)
    alignas(64) inline static const char zeros[16 * 64] = {};

    template <typename Products>
    static uint64_t time(Products products) {
        const auto ticks = [] {
            _mm_lfence();
            return __rdtsc();
        };
        uint64_t start = 0;
        for (int i = 0; i < 2 * kTimes; ++i) {
            if (i == kTimes) start = ticks();
            products();
        }
        return ticks() - start;
    }
    unsigned tasks_ = 0;
    uint64_t last_ = 0;
#endif
    bool takes_few_ = false;
};
inline thread_local TileSharing tile_sharing;
inline void before_task() { tile_sharing.look(); }

// Before a thread goes back to other people's code, which may load a shape of its own.
inline void leave_tiles() {
    if (tile_rows != -1) {
        release_tiles();
        tile_rows = -1;
    }
}

}  // namespace moesaic

#else

namespace moesaic {
inline void before_task() {}
inline void leave_tiles() {}
}  // namespace moesaic

#endif
