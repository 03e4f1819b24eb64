// Rounding and packing weights, for Python.

#include "pack.h"

#include "export.h"

using namespace moesaic;

// Every row of x (rows, depth), rotated, times a scale: out (rows, depth) in fp32.
MOESAIC_EXPORT int64_t moesaic_rotate_rows(const void* x, int64_t is_bf16, int64_t rows, int64_t depth, float scale,
                                           float* out) try {
    const WeightRows weight{x, is_bf16 != 0, rows, depth};
    run_team(16.0 * double(rows) * double(depth), [&](Team& team) { rotate_rows(team, weight, scale, out); });
    return 0;
} MOESAIC_NO_MEMORY

// scales (rows); steps (rows, depth / group) of 4 bits, null for 8 (group 0).
MOESAIC_EXPORT int64_t moesaic_quantize_weight(const void* x, int64_t is_bf16, int64_t rows, int64_t depth, int64_t group,
                                               void* values, int8_t* steps, float* scales) try {
    const WeightRows weight{x, is_bf16 != 0, rows, depth};
    run_team(32.0 * double(rows) * double(depth), [&](Team& team) {
        if (group)
            quantize_to_nibbles(team, weight, group, static_cast<uint8_t*>(values), steps, scales);
        else
            quantize_to_bytes(team, weight, static_cast<int8_t*>(values), scales);
    });
    return 0;
} MOESAIC_NO_MEMORY

// In MXFP4: values (rows, depth / 2) and scales (rows, depth / 32).
MOESAIC_EXPORT int64_t moesaic_quantize_to_mxfp4(const void* x, int64_t is_bf16, int64_t rows, int64_t depth,
                                                 uint8_t* values, uint8_t* scales) try {
    const WeightRows weight{x, is_bf16 != 0, rows, depth};
    run_team(16.0 * double(rows) * double(depth), [&](Team& team) { quantize_to_mxfp4(team, weight, values, scales); });
    return 0;
} MOESAIC_NO_MEMORY

// `count` matrices (rows, depth) into panels at packed->data; groups: the bytes of every group of 4 bits.
MOESAIC_EXPORT int64_t moesaic_pack_weight(const Packed* packed, int64_t count, int64_t rows, const void* numbers,
                                           int64_t is_fp32, const uint8_t* groups, int64_t is_gated) try {
    const Unpacked weight{static_cast<const char*>(numbers), is_fp32 != 0, groups, is_gated != 0};
    const int64_t panels = count * packed->panels();
    run_team(8.0 * double(panels) * kPanel * double(packed->depth), [&](Team& team) {
        team.tasks(long(panels), [&](long index) {
            pack_panel(*packed, rows, weight, index,
                       const_cast<uint8_t*>(packed->data) + size_t(index) * packed->panel_bytes());
        });
    });
    return 0;
} MOESAIC_NO_MEMORY
