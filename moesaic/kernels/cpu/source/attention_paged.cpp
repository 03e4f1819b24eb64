// New keys and values into the blocks of a cache, and attention over them: see attention_paged.h.

#include "attention_paged.h"

#include "export.h"

namespace moesaic {

void paged_attention(Team& team, const AttentionCall& call) {
    const PagedPlan& plan = *call.plan;
    const long many = long(plan.many_rows.size());
    const int num_few = int(plan.few_rows.size());
    const Slices few{num_few, team.size(), std::clamp(num_few / (4 * team.size()), 1, 4)};
    const auto work_on = [&](const AttentionItem& item, const AttentionItem* next) {
#if defined(MOESAIC_TILES)
        if (item.rows > kFewAttentionRows) {
            call.cache.is_quantized() ? ManyRows<true>(call, item).run() : ManyRows<false>(call, item).run();
            return;
        }
#endif
        ItemWork(call, item).run(next);
    };
    team.tasks(many + few.count(), [&](long task) {
        if (task < many) {
            work_on(plan.many_rows[size_t(task)], nullptr);
            return;
        }
        const int end = few.begin(int(task - many) + 1);
        for (int i = few.begin(int(task - many)); i < end; ++i)
            work_on(plan.few_rows[size_t(i)], i + 1 < end ? &plan.few_rows[size_t(i) + 1] : nullptr);
    });
    if (plan.merges.empty()) return;
    team.tasks(long(plan.merges.size()), [&](long i) { merge_splits(call, plan.merges[size_t(i)]); });
}

}  // namespace moesaic

// key and value (T, num_kv_heads, head_dim) bf16, tokens key_stride and value_stride elements apart. Returns 1 when the
// batch names positions that have no block.
MOESAIC_EXPORT int64_t moesaic_paged_write(const uint16_t* key, int64_t key_stride, const uint16_t* value,
                                           int64_t value_stride, int64_t num_tokens, void* keys, void* values,
                                           float* key_scales, float* value_scales, int64_t num_blocks,
                                           int64_t num_kv_heads, int64_t head_dim, int64_t block_size,
                                           const int32_t* starts, const int32_t* lengths, const int32_t* tables,
                                           int64_t num_sequences, int64_t table_width) try {
    using namespace moesaic;
    const PagedCache cache{keys, values, key_scales, value_scales, num_blocks, num_kv_heads, head_dim, block_size};
    const PagedBatch batch{starts, lengths, tables, num_sequences, table_width};
    if (!is_valid(batch, cache, num_tokens)) return 1;
    const std::vector<WriteItem> writes = plan_writes(batch, cache);
    run_team(16.0 * double(num_tokens * num_kv_heads * head_dim), [&](Team& team) {
        team.tasks(long(writes.size()) * num_kv_heads, [&](long i) {
            const WriteItem& item = writes[size_t(i / num_kv_heads)];
            const int64_t head = i % num_kv_heads;
            write_kv_panel(cache, item, head, key + item.first_token * key_stride + head * head_dim, key_stride,
                        value + item.first_token * value_stride + head * head_dim, value_stride, attention_scratch());
        });
    });
    return 0;
} MOESAIC_NO_MEMORY

// query (T, num_heads, head_dim) bf16, tokens query_stride elements apart; out (T, num_heads, head_dim) bf16. window: the
// positions that a query sees, 0 for all; sinks (num_heads) or null.
MOESAIC_EXPORT int64_t moesaic_paged_attention(const uint16_t* query, int64_t query_stride, uint16_t* out,
                                               int64_t num_tokens, int64_t num_heads, float scale,
                                               int64_t window, const float* sinks, void* keys,
                                               void* values, float* key_scales, float* value_scales,
                                               int64_t num_blocks, int64_t num_kv_heads, int64_t head_dim,
                                               int64_t block_size, const int32_t* starts, const int32_t* lengths,
                                               const int32_t* tables, int64_t num_sequences, int64_t table_width) try {
    using namespace moesaic;
    const PagedCache cache{keys, values, key_scales, value_scales, num_blocks, num_kv_heads, head_dim, block_size};
    const PagedBatch batch{starts, lengths, tables, num_sequences, table_width};
    if (!is_valid(batch, cache, num_tokens)) return 1;
    const PagedPlan plan = plan_paged(batch, cache, num_heads, window_of(window));
    static thread_local Scratch partials;
    const AttentionCall call{query, query_stride, out, num_heads * head_dim, num_heads,
                             scale, sinks, cache, batch, &plan, partials.get<float>(plan.partial_floats + 1)};
    run_team(plan.work, [&](Team& team) { paged_attention(team, call); });
    return 0;
} MOESAIC_NO_MEMORY
