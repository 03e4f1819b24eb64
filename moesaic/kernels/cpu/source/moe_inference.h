// A layer of experts for inference: every expert's MLP on its tokens and their weighted sum, in one call.
#pragma once

#include "activation_math.h"
#include "packed.h"

namespace moesaic {

constexpr int kHiddenColumns = 128;  // of a task of the first product

// One MLP, or a stack of them. For gated activations a panel of `up` is 16 columns of the gate and the same 16 of up.
struct PackedMlp {
    Packed up, down;
    const float* up_bias;    // of every column of up's panels, padded; or null
    const float* down_bias;  // (E, H); or null
    int64_t activation;
    int64_t intermediate;  // F

    int hidden_of_panel() const { return is_gated(activation) ? kPanel / 2 : kPanel; }
    int chunks() const { return int((intermediate + kHiddenColumns - 1) / kHiddenColumns); }
    // A row of hidden columns in bf16: as the down product takes it, if that does not change rows.
    int activated_columns() const { return round_up(int(intermediate), kPanel); }
    size_t activated_bytes() const { return Packed::odd_lines(size_t(activated_columns()) * sizeof(bf16)); }
};

struct MoeCall {
    PackedMlp experts;
    int64_t num_experts;
    const PackedMlp* residual;      // or null
    const float* residual_weights;  // (T), or null for 1
    int64_t tokens, top_k;
    const void* x;  // (T, H)
    int64_t x_is_bf16;
    const int64_t* expert_ids;     // (T, top_k); a negative one is no route
    const float* routing_weights;  // (T, top_k)
    void* out;                     // (T, H)
    int64_t out_is_bf16;
    char* workspace;  // packed_moe_workspace bytes, aligned to 64

    bool is_private() const { return are_private(tokens); }
};

size_t packed_moe_workspace(const MoeCall& call);

// Every thread of the team calls this, with equal arguments; complete when it returns.
void packed_moe(Team& team, const MoeCall& call);

}  // namespace moesaic
