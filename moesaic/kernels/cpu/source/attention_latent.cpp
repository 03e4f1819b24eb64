// New vectors into the blocks of a cache of latents, and attention over them: see attention_latent.h.

#include "attention_latent.h"

#include "export.h"

namespace moesaic {

void latent_attention(Team& team, const LatentCall& call) {
    const LatentPart& part = *call.part;
    team.tasks(long(part.items.size()), [&](long i) { attend_item(call, part.items[size_t(i)]); });
    if (part.merges.empty()) return;
    team.tasks(long(part.merges.size()), [&](long i) { merge_latent_splits(call, part.merges[size_t(i)]); });
}

}  // namespace moesaic

// vectors (T, dim) bf16, tokens `stride` elements apart. Returns 1 when the batch names positions that have no block.
MOESAIC_EXPORT int64_t moesaic_latent_write(const uint16_t* vectors, int64_t stride, int64_t num_tokens, void* latents,
                                            int64_t num_blocks, int64_t dim, int64_t block_size, const int32_t* starts,
                                            const int32_t* lengths, const int32_t* tables, int64_t num_sequences,
                                            int64_t table_width) try {
    using namespace moesaic;
    const PagedCache cache{latents, nullptr, nullptr, nullptr, num_blocks, 1, dim, block_size};
    const PagedBatch batch{starts, lengths, tables, num_sequences, table_width};
    if (!is_valid(batch, cache, num_tokens)) return 1;
    const std::vector<WriteItem> writes = plan_writes(batch, cache);
    run_team(8.0 * double(num_tokens * dim), [&](Team& team) {
        team.tasks(long(writes.size()), [&](long i) {
            const WriteItem& item = writes[size_t(i)];
            write_latent_panel(cache, item, vectors + item.first_token * stride, stride, attention_scratch());
        });
    });
    return 0;
} MOESAIC_NO_MEMORY

// query (T, num_heads, dim rounded up to 32) bf16, zeros behind dim; out (T, num_heads, rank rounded up to 32) bf16.
MOESAIC_EXPORT int64_t moesaic_latent_attention(const uint16_t* query, uint16_t* out, int64_t num_tokens,
                                                int64_t num_heads, int64_t rank, float scale, void* latents,
                                                int64_t num_blocks, int64_t dim, int64_t block_size,
                                                const int32_t* starts, const int32_t* lengths, const int32_t* tables,
                                                int64_t num_sequences, int64_t table_width) try {
    using namespace moesaic;
    const PagedCache cache{latents, nullptr, nullptr, nullptr, num_blocks, 1, dim, block_size};
    const PagedBatch batch{starts, lengths, tables, num_sequences, table_width};
    if (!is_valid(batch, cache, num_tokens)) return 1;
    const LatentPlan plan = plan_latent(batch, cache, num_heads, rank, num_tokens * num_heads);
    if (plan.parts.empty()) return 0;
    static thread_local Scratch partials;
    const LatentCall call{query, out,   num_heads,      rank, scale, cache,
                          batch, &plan.parts.front(), partials.get<float>(plan.partial_floats + 1)};
    run_team(plan.work, [&](Team& team) { latent_attention(team, call); });
    return 0;
} MOESAIC_NO_MEMORY
