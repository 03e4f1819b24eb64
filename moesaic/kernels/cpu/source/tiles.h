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

// Tiles 0 to 3 hold sums, top left, top right, bottom left, bottom right; 4 and 5 rows of A; 6 columns of B, the left ones
// and then the right ones. The eighth stays empty: while what shares the core keeps tiles as well, it seems, too few are
// left for the next loads, and with eight in use a product of operands in the caches takes half as long again.
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

// Rows of the upper and lower tiles of A and C; loading a shape clears all tiles, and costs nothing when it is the same.
inline thread_local int tile_rows = -1;
inline void configure_tiles(int top, int bottom) {
    const int wanted = top * 32 + bottom;
    if (tile_rows != wanted) {
        load_tile_shape(tile_shape(top, bottom));
        tile_rows = wanted;
    }
}
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
inline void leave_tiles() {}
}  // namespace moesaic

#endif
