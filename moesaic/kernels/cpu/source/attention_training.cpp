// Causal attention of training for ctypes.

#include "attention_training.h"

#include "export.h"

namespace moesaic {
namespace {

// The four strides of a tensor whose last one is 1 are passed as three.
Heads heads(const void* data, const int64_t* strides) {
    return {static_cast<const bf16*>(data), strides[0], strides[1], strides[2]};
}

AttentionShape shape_of(const int64_t* sizes, double scale) {
    return {int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]), int(sizes[4]), scale, int(sizes[5])};
}

// Runs attention(team, documents, shared) on all threads; numbers (B, S) or null.
template <typename Attention>
void run(const AttentionShape& shape, const int64_t* numbers, size_t (*shared_bytes)(const AttentionShape&, int),
         Attention&& attention) {
    thread_local Scratch scratch;
    // A team may turn out smaller than asked for: it is then of one, which needs no shared operands.
    const size_t operands = shared_bytes(shape, omp_get_max_threads());
    const size_t blocks = size_t(shape.batch) * shape.blocks();
    Pieces count(nullptr);
    const auto split = [&](Pieces& pieces) {
        struct Split {
            void* operands;
            float *ranks, *low, *high;
        };
        return Split{pieces.take<char>(operands), pieces.take<float>(numbers ? blocks * kBlock : 0),
                     pieces.take<float>(numbers ? blocks : 0), pieces.take<float>(numbers ? blocks : 0)};
    };
    split(count);
    Pieces pieces(scratch.get<char>(count.bytes() + kAlignment));
    const auto shared = split(pieces);
    Documents documents;
    if (numbers) documents = {shared.ranks, shared.low, shared.high};
    run_team(2.0 * shape.batch * shape.heads * shape.length * shape.length * shape.dim, [&](Team& team) {
        if (numbers) rank_documents(team, shape, numbers, shared.ranks, shared.low, shared.high);
        attention(team, documents, shared.operands);
    });
}

}  // namespace
}  // namespace moesaic

// sizes: batch, length, heads, kv_heads, dim (a multiple of 16), window (length where there is none); scale: on the
// scores; strides: three each of query, key and value; sinks (heads) or null.
MOESAIC_EXPORT int64_t moesaic_attention_forward(const int64_t* sizes, double scale, const int64_t* strides,
                                                 const void* query, const void* key, const void* value,
                                                 const int64_t* documents, const float* sinks, void* out,
                                                 float* normalizers) try {
    using namespace moesaic;
    const AttentionShape shape = shape_of(sizes, scale);
    run(shape, documents, forward_shared_bytes, [&](Team& team, const Documents& ranked, void* shared) {
        const ForwardArguments arguments{shape,
                                         heads(query, strides),
                                         heads(key, strides + 3),
                                         heads(value, strides + 6),
                                         ranked,
                                         sinks,
                                         static_cast<bf16*>(out),
                                         normalizers};
        attention_forward(team, arguments, shared);
    });
    return 0;
} MOESAIC_NO_MEMORY

// strides: three each of query, key, value, out and grad; grad_sinks (batch, heads, length / 32 rounded up) or null.
MOESAIC_EXPORT int64_t moesaic_attention_backward(const int64_t* sizes, double scale, const int64_t* strides,
                                                  const void* query, const void* key, const void* value,
                                                  const void* out, const void* grad, const int64_t* documents,
                                                  const float* normalizers, const float* sinks, void* grad_query,
                                                  void* grad_key, void* grad_value, float* grad_sinks) try {
    using namespace moesaic;
    const AttentionShape shape = shape_of(sizes, scale);
    run(shape, documents, backward_shared_bytes, [&](Team& team, const Documents& ranked, void* shared) {
        const BackwardArguments arguments{shape,
                                          heads(query, strides),
                                          heads(key, strides + 3),
                                          heads(value, strides + 6),
                                          heads(out, strides + 9),
                                          heads(grad, strides + 12),
                                          ranked,
                                          normalizers,
                                          sinks,
                                          static_cast<bf16*>(grad_query),
                                          static_cast<bf16*>(grad_key),
                                          static_cast<bf16*>(grad_value),
                                          grad_sinks};
        attention_backward(team, arguments, shared);
    });
    return 0;
} MOESAIC_NO_MEMORY
