// The layer of experts on packed weights, for Python and for a whole pass.
//
// Two products and a barrier between them. The first makes an expert's hidden rows, 128 columns at a time, which go from
// the sums through the activation to bf16 while they are in the first-level cache. Where the second product takes rows of
// another form, whole rows of them are then brought into it, by who made them or, where several did, behind a barrier.
// The second is cut by output columns: one thread adds up all experts' share of a column in rising order of the
// experts, so nothing is scattered, and a token's result depends neither on the other tokens nor on the threads. The
// residual MLP (or shared expert) is one more expert, of all tokens, with a coefficient of its own.
#include "moe_inference.h"

#include <vector>

#include "export.h"

namespace moesaic {

namespace {

// A run of rows that an expert (or the residual, whose number is num_experts) takes through the first product together.
struct MoeRun {
    int32_t expert, first, rows;
    int32_t first_task;
};

// Tokens of one pass: what is between the products stays within some tens of megabytes, and an expert still has enough
// rows to make its weights worth reading.
constexpr int64_t kPassTokens = 2048;

constexpr int kFewRows = 6;  // of an expert: its weights take longer to read than to use

// Where everything of a pass is: in the workspace, but for few tokens everything up to residual_rows is in memory of each
// member's own, own_bytes of it.
struct MoeWorkspace {
    int32_t* starts;      // (E + 1): rows of an expert
    int32_t* token_ids;   // (routes): token of a row
    float* weights;       // (routes): coefficient of a row
    MoeRun* runs;
    int32_t* num_runs;    // and, after it, the number of tasks, and the rows of the longest run
    char* rows;           // prepared tokens for the experts, then for the residual where its format differs
    char* residual_rows;
    char* hidden;         // (routes) prepared rows of the second product
    char* residual_hidden;
    char* activated;      // (routes) what those are made of, rows of bf16; the same, where rows are not changed
    char* residual_activated;
    size_t bytes, own_bytes = 0;

    // Sizes alone, where there is no memory yet.
    MoeWorkspace(const MoeCall& call, char* base, char* own = nullptr) {
        const size_t tokens = size_t(std::min(call.tokens, kPassTokens)), routes = tokens * size_t(call.top_k);
        size_t used = 0;
        auto take = [&](size_t bytes) {
            // As a number, since there is no base where only the size is asked for.
            const auto place = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(own ? own : base) + used);
            used += (bytes + 63) / 64 * 64;
            return place;
        };
        const size_t most_runs = size_t(call.num_experts) + routes / kFewestRows + tokens / kFewestRows + 2;
        starts = reinterpret_cast<int32_t*>(take((size_t(call.num_experts) + 1) * 4));
        token_ids = reinterpret_cast<int32_t*>(take(routes * 4));
        weights = reinterpret_cast<float*>(take(routes * 4));
        runs = reinterpret_cast<MoeRun*>(take(most_runs * sizeof(MoeRun)));
        num_runs = reinterpret_cast<int32_t*>(take(12));
        const Packed& up = call.experts.up;
        rows = up.is_integer() ? take(tokens * up.row_bytes()) : nullptr;
        residual_rows = nullptr;
        if (call.residual && call.residual->up.is_integer())
            residual_rows = call.residual->up.format == up.format ? rows : take(tokens * call.residual->up.row_bytes());
        if (call.is_private()) {
            own_bytes = used;
            used = 0;
            own = nullptr;
        }
        hidden = take(routes * call.experts.down.row_bytes());
        residual_hidden = call.residual ? take(tokens * call.residual->down.row_bytes()) : nullptr;
        const auto take_activated = [&](const PackedMlp& mlp, size_t count, char* prepared) {
            return mlp.down.changes_rows() ? take(count * mlp.activated_bytes()) : prepared;
        };
        activated = take_activated(call.experts, routes, hidden);
        residual_activated = call.residual ? take_activated(*call.residual, tokens, residual_hidden) : nullptr;
        bytes = used;
    }
};

// The hidden columns of one panel, from a row's sums of the up product.
struct ActivateRow {
    int64_t activation = kSwiglu;
    const float* bias = nullptr;  // of the panel's columns
    char* hidden = nullptr;       // the panel's first column of row 0, in bf16
    size_t stride = 0;            // in bytes

    MOESAIC_INLINE void operator()(int row, const float* sums) const {
        bf16* to = reinterpret_cast<bf16*>(hidden + size_t(row) * stride);
        const auto sum = [&](int v) { return bias ? add(load(sums + v), load(bias + v)) : load(sums + v); };
        if (activation == kSwiglu)
            for (int v = 0; v < kPanel / 2; v += W)
                store_bf16(to + v, activate_gated<kSwiglu>(sum(v), sum(kPanel / 2 + v)));
        else if (activation == kSwigluOai)
            for (int v = 0; v < kPanel / 2; v += W)
                store_bf16(to + v, activate_gated<kSwigluOai>(sum(v), sum(kPanel / 2 + v)));
        else
            for (int v = 0; v < kPanel; v += W)
                store_bf16(to + v, activation == kGelu ? gelu(sum(v)) : gelu_tanh(sum(v)));
    }
};

// Adds a row's sums of the down product, times its coefficient, to its token's.
struct AddRow {
    const int32_t* token_ids = nullptr;  // of the rows; null: they are the tokens from `first` on
    const float* weights = nullptr;      // coefficients of the rows; null: 1
    int64_t first = 0;
    const float* bias = nullptr;  // of the panel's columns
    int64_t columns = 0;          // that are left
    float* out = nullptr;         // [tokens][ld], the panel's first column
    int64_t ld = 0;

    MOESAIC_INLINE void operator()(int row, const float* sums) const {
        const Vf weight = set1(weights ? weights[row] : 1.0f);
        float* to = out + (token_ids ? token_ids[row] : first + row) * ld;
        for (int v = 0; v < kPanel; v += W) {
            Vf y = load(sums + v);
            if (bias && columns > v) y = add(y, load_row(bias + v, columns - v));
            store(to + v, add(load(to + v), mul(weight, y)));
        }
    }
};

// Tokens [first_token, first_token + tokens) sorted by expert (stable), and the runs of the first product.
void sort_routes(const MoeCall& call, int64_t first_token, int64_t tokens, const MoeWorkspace& work) {
    const int64_t* ids = call.expert_ids + first_token * call.top_k;
    const float* weights = call.routing_weights + first_token * call.top_k;
    const int64_t experts = call.num_experts, routes = tokens * call.top_k;
    std::fill(work.starts, work.starts + experts + 1, 0);
    for (int64_t i = 0; i < routes; ++i)
        if (ids[i] >= 0) ++work.starts[ids[i] + 1];
    for (int64_t e = 0; e < experts; ++e) work.starts[e + 1] += work.starts[e];
    for (int64_t i = 0; i < routes; ++i)
        if (ids[i] >= 0) {
            const int32_t row = work.starts[ids[i]]++;
            work.token_ids[row] = int32_t(i / call.top_k);
            work.weights[row] = weights[i];
        }
    for (int64_t e = experts; e > 0; --e) work.starts[e] = work.starts[e - 1];
    work.starts[0] = 0;

    int count = 0, task = 0, longest = 0;
    auto add_runs = [&](int64_t expert, int64_t first, int64_t rows, const PackedMlp& mlp) {
        const int most = rows_at_once(mlp.up.used_part(kMostRows).bytes, kExpertRowsCache);
        const int parts = int((rows + most - 1) / most);
        for (int part = 0; part < parts; ++part) {
            const int64_t begin = rows * part / parts, end = rows * (part + 1) / parts;
            work.runs[count++] = {int32_t(expert), int32_t(first + begin), int32_t(end - begin), task};
            task += mlp.chunks();
            longest = std::max(longest, int(end - begin));
        }
    };
    // The residual MLP has the most rows, so its tasks come first.
    if (call.residual) add_runs(experts, 0, tokens, *call.residual);
    for (int64_t e = 0; e < experts; ++e)
        add_runs(e, work.starts[e], work.starts[e + 1] - work.starts[e], call.experts);
    work.num_runs[0] = count;
    work.num_runs[1] = task;
    work.num_runs[2] = longest;
}

void moe_pass(Team& team, const MoeCall& call, int64_t first_token, int64_t tokens, const MoeWorkspace& work) {
    const PackedMlp& experts = call.experts;
    const int64_t hidden_size = experts.up.depth;
    auto prepare = [&](const Packed& weight, int64_t token, char* to) {
        with_element_type(call.x_is_bf16, [&](auto kind) {
            using T = decltype(kind);
            prepare_row(weight, static_cast<const T*>(call.x) + (first_token + token) * hidden_size, to);
        });
    };

    const int64_t chunk_tokens = 8;
    const bool has_rows = work.rows || work.residual_rows;
    const long row_tasks = has_rows ? long((tokens + chunk_tokens - 1) / chunk_tokens) : 0;
    auto begin = [&](long task) {
        if (task == 0) {
            sort_routes(call, first_token, tokens, work);
            return;
        }
        const int64_t first = (task - 1) * chunk_tokens, last = std::min(first + chunk_tokens, tokens);
        for (int64_t token = first; token < last; ++token) {
            if (work.rows) prepare(experts.up, token, work.rows + size_t(token) * experts.up.row_bytes());
            if (work.residual_rows && work.residual_rows != work.rows)
                prepare(call.residual->up, token, work.residual_rows + size_t(token) * call.residual->up.row_bytes());
        }
    };
    if (call.is_private())
        for (long task = 0; task < 1 + row_tasks; ++task) begin(task);
    else
        team.tasks(1 + row_tasks, begin);

    static thread_local Scratch sums_buffer, activated_buffer, rows_buffer, out_buffer;
    float* c = sums_buffer.get<float>(size_t(kPanelsOfStep) * kMostRows * kPanel);
    Waiting<ActivateRow> activating;
    int held = -1;
    const char* a = nullptr;
    size_t stride = 0;  // between its rows
    char* activated = nullptr;  // of the run that is held: its rows of hidden columns, whole ones or a task's
    const int num_runs = work.num_runs[0], num_tasks = work.num_runs[1];
    auto run_of = [&](int task) {
        return int(std::upper_bound(work.runs, work.runs + num_runs, task,
                                    [](int wanted, const MoeRun& run) { return wanted < run.first_task; }) -
                   work.runs) - 1;
    };
    auto mlp_of = [&](const MoeRun& run) -> const PackedMlp& {
        return run.expert == call.num_experts ? *call.residual : experts;
    };
    // The first panel of a task, which covers 128 hidden columns.
    auto first_panel = [&](int task) {
        const MoeRun& run = work.runs[run_of(task)];
        const PackedMlp& mlp = mlp_of(run);
        return mlp.up.panel(run.expert == call.num_experts ? 0 : run.expert,
                            (task - run.first_task) * (kHiddenColumns / mlp.hidden_of_panel()));
    };
    const auto hidden_rows = [&](const MoeRun& run) {
        char* all = run.expert == call.num_experts ? work.residual_hidden : work.hidden;
        return all + size_t(run.first) * mlp_of(run).down.row_bytes();
    };
    // Rows [first, last) of a run.
    const auto prepare_rows = [&](const MoeRun& run, const char* from, int first, int last, char* to) {
        const Packed& down = mlp_of(run).down;
        const size_t from_bytes = mlp_of(run).activated_bytes(), to_bytes = down.row_bytes();
        for (int row = first; row < last; ++row)
            prepare_row(down, reinterpret_cast<const bf16*>(from + size_t(row) * from_bytes), to + size_t(row) * to_bytes);
    };
    const auto global_rows = [&](const MoeRun& run) {
        char* all = run.expert == call.num_experts ? work.residual_activated : work.activated;
        return all + size_t(run.first) * mlp_of(run).activated_bytes();
    };
    // Task `task` of those in [first, last), which are done in order by this thread.
    auto do_task = [&](int task, int first, int last) {
        const int index = run_of(task);
        const MoeRun run = work.runs[index];
        const bool is_residual = run.expert == call.num_experts;
        const PackedMlp& mlp = mlp_of(run);
        const size_t row_bytes = mlp.up.row_bytes();
        const RowPart part = mlp.up.used_part(run.rows);
        const char* source = is_residual ? work.residual_rows : work.rows;
        const int chunk = task - run.first_task;
        // Rows that this thread makes whole are prepared by it too, while its second-level cache has them.
        const bool is_whole =
            mlp.down.changes_rows() && run.first_task >= first && run.first_task + mlp.chunks() <= last;
        const size_t activated_stride =
            is_whole ? mlp.activated_bytes() : Packed::odd_lines(kHiddenColumns * sizeof(bf16));
        if (held != index) {
            held = index;
            if (source && (is_residual || run.rows == 1)) {
                a = source + size_t(is_residual ? run.first : work.token_ids[run.first]) * row_bytes + part.first;
                stride = row_bytes;
            } else {
                char* to = rows_buffer.get<char>(size_t(run.rows) * part.bytes);
                a = to;
                stride = part.bytes;
                for (int r = 0; r < run.rows; ++r, to += stride) {
                    const int token = is_residual ? run.first + r : work.token_ids[run.first + r];
                    if (source)
                        std::memcpy(to, source + size_t(token) * row_bytes + part.first, stride);
                    else
                        prepare(mlp.up, token, to);
                }
            }
            activated = activated_buffer.get<char>(size_t(run.rows) * activated_stride);
        }
        const int64_t matrix = is_residual ? 0 : run.expert;
        const int per_chunk = kHiddenColumns / mlp.hidden_of_panel();
        const int begin = chunk * per_chunk, end = std::min(begin + per_chunk, mlp.up.panels());
        packed_panels(mlp.up, matrix, begin, end, run.rows, a, stride, c, task + 1 < last ? first_panel(task + 1) : nullptr,
                      activating, [&](int p, StoreRounded&) {
                          const float* bias =
                              mlp.up_bias ? mlp.up_bias + (matrix * mlp.up.panels() + p) * int64_t(kPanel) : nullptr;
                          char* to =
                              activated + size_t(is_whole ? p : p - begin) * mlp.hidden_of_panel() * sizeof(bf16);
                          return PanelResult<ActivateRow>{{mlp.activation, bias, to, activated_stride}, {}};
                      });
        const bool is_end = chunk + 1 == mlp.chunks();
        if (is_whole && !is_end) return;
        activating.all();
        // What lies behind the last hidden column must not count, whatever it came out as.
        const int start = is_whole ? 0 : chunk * kHiddenColumns, columns = mlp.activated_columns() - start;
        for (int r = 0; is_end && columns > mlp.intermediate - start && r < run.rows; ++r) {
            bf16* row = reinterpret_cast<bf16*>(activated + size_t(r) * activated_stride);
            std::fill(row + (mlp.intermediate - start), row + columns, bf16(0));
        }
        if (is_whole) {
            prepare_rows(run, activated, 0, run.rows, hidden_rows(run));
            return;
        }
        // All of a task's columns at once: a line that other threads have read lately takes long to be written.
        char* to = global_rows(run) + size_t(start) * sizeof(bf16);
        for (int r = 0; r < run.rows; ++r, to += mlp.activated_bytes()) {
            const bf16* row = reinterpret_cast<const bf16*>(activated + size_t(r) * activated_stride);
            for (int i = 0; i < std::min(columns, kHiddenColumns); i += 2 * W)
                storei(reinterpret_cast<bf16*>(to) + i, loadi(row + i));
        }
    };
    // Few rows take as long as their weights take to come: long streams. Many take as long as they are, so no thread
    // begins a long slice last; neighbours share their rows and read ahead for each other: a whole run's tasks where
    // there are many runs.
    const int longest = work.num_runs[2] <= kFewRows    ? std::max(num_tasks, 1)
                        : num_runs >= 8 * team.size() ? experts.chunks()
                                                      : 8;
    const Slices up_slices{num_tasks, team.size(), longest};
    team.tasks(up_slices.count(), [&](long slice) {
        const int first = up_slices.begin(int(slice)), last = up_slices.begin(int(slice) + 1);
        for (int task = first; task < last; ++task) do_task(task, first, last);
    });
    // Rows that several slices made. Few of them every member prepares for itself.
    static thread_local std::vector<int> split;
    split.clear();
    if (experts.down.changes_rows() || (call.residual && call.residual->down.changes_rows()))
        up_slices.each_border([&](int task) {
            const int index = run_of(task);
            if (work.runs[index].first_task < task && mlp_of(work.runs[index]).down.changes_rows() &&
                (split.empty() || split.back() != index))
                split.push_back(index);
        });
    const bool are_own = work.num_runs[2] <= kFewRows;
    char* own = nullptr;
    if (are_own && !split.empty()) {
        size_t bytes = 0;
        for (const int index : split) bytes += size_t(work.runs[index].rows) * mlp_of(work.runs[index]).down.row_bytes();
        own = activated_buffer.get<char>(bytes);
        char* to = own;
        for (const int index : split) {
            const MoeRun& run = work.runs[index];
            prepare_rows(run, global_rows(run), 0, run.rows, to);
            to += size_t(run.rows) * mlp_of(run).down.row_bytes();
        }
    } else if (!split.empty()) {
        team.tasks(long(split.size()) * team.size(), [&](long task) {
            const MoeRun& run = work.runs[split[size_t(task / team.size())]];
            const int part = int(task % team.size());
            prepare_rows(run, global_rows(run), run.rows * part / team.size(), run.rows * (part + 1) / team.size(),
                     hidden_rows(run));
        });
    }
    // The hidden rows of an expert, or of the residual.
    const auto rows_of = [&](int64_t expert) {
        if (are_own) {
            const char* from = own;
            for (const int index : split) {
                const MoeRun& run = work.runs[index];
                if (run.expert == expert) return from;
                from += size_t(run.rows) * mlp_of(run).down.row_bytes();
            }
        }
        if (expert == call.num_experts) return static_cast<const char*>(work.residual_hidden);
        return static_cast<const char*>(work.hidden) + size_t(work.starts[expert]) * experts.down.row_bytes();
    };

    const int panels = experts.down.panels();
    // Sums that stay in the second-level cache.
    const int64_t fit = std::max<int64_t>(1, int64_t(kRowsCache) / (tokens * kPanel * 4));
    const Slices slices{panels, team.size(), int(std::min<int64_t>(fit, panels))};
    team.tasks(slices.count(), [&](long task) {
        const int begin = slices.begin(int(task)), end = slices.begin(int(task) + 1), ld = (end - begin) * kPanel;
        float* out = out_buffer.get<float>(size_t(tokens) * ld);
        std::fill(out, out + size_t(tokens) * ld, 0.0f);
        Waiting<AddRow> adding;
        // Rows [first, first + count) of the total ones, by one matrix; `rows`: the first of them; `following`: the weights
        // that come after them.
        auto add_product = [&](const PackedMlp& mlp, int64_t matrix, int64_t first, int64_t count, int64_t total,
                               const char* rows, const uint8_t* following, const int32_t* token_ids,
                               const float* weights) {
            const size_t stride = mlp.down.row_bytes();
            const int most = rows_at_once(mlp.down.used_part(kMostRows).bytes, kExpertRowsCache);
            const int parts = int((count + most - 1) / most);
            for (int part = 0; part < parts; ++part) {
                const int64_t from = first + count * part / parts, to = first + count * (part + 1) / parts;
                const size_t unused = mlp.down.used_part(int(to - from)).first;
                packed_panels(
                    mlp.down, matrix, begin, end, int(to - from), rows + size_t(from - first) * stride + unused, stride, c,
                    part + 1 < parts ? mlp.down.panel(matrix, begin) : following, adding, [&](int p, StoreRounded&) {
                        // The rows that follow come from the third-level cache or from memory.
                        Next next;
                        const int64_t ahead = std::min(to - from, total - to);
                        next.lines = rows + (size_t(to - first) + size_t(ahead) * (p - begin) / (end - begin)) * stride;
                        next.count = ahead * int64_t(stride) / (64 * (end - begin));
                        const int64_t column = int64_t(p) * kPanel;
                        const float* bias =
                            mlp.down_bias ? mlp.down_bias + matrix * mlp.down.columns + column : nullptr;
                        return PanelResult<AddRow>{{token_ids ? token_ids + from : nullptr,
                                                    weights ? weights + from : nullptr, from, bias,
                                                    mlp.down.columns - column, out + (p - begin) * kPanel, ld},
                                                   next};
                    });
            }
        };
        auto skip_empty = [&](int64_t from) {
            while (from < call.num_experts && work.starts[from] == work.starts[from + 1]) ++from;
            return from;
        };
        for (int64_t expert = skip_empty(0); expert < call.num_experts;) {
            const int64_t following = skip_empty(expert + 1);
            const uint8_t* next = following < call.num_experts ? experts.down.panel(following, begin)
                                  : call.residual              ? call.residual->down.panel(0, begin)
                                                               : nullptr;
            add_product(experts, expert, work.starts[expert], work.starts[expert + 1] - work.starts[expert],
                        work.starts[call.num_experts], rows_of(expert), next, work.token_ids, work.weights);
            expert = following;
        }
        if (call.residual)
            add_product(*call.residual, 0, 0, tokens, tokens, rows_of(call.num_experts), nullptr, nullptr,
                        call.residual_weights ? call.residual_weights + first_token : nullptr);
        adding.all();
        with_element_type(call.out_is_bf16, [&](auto kind) {
            using T = decltype(kind);
            T* to = static_cast<T*>(call.out) + first_token * hidden_size;
            for (int64_t token = 0; token < tokens; ++token)
                for (int v = 0; v < (end - begin) * kPanel; v += W) {
                    const int64_t column = int64_t(begin) * kPanel + v, left = hidden_size - column;
                    if (left > 0) store_row(to + token * hidden_size + column, load(out + token * ld + v), left);
                }
        });
    });
}

}  // namespace

size_t packed_moe_workspace(const MoeCall& call) { return MoeWorkspace(call, nullptr).bytes; }

void packed_moe(Team& team, const MoeCall& call) {
    static thread_local Scratch own;
    const bool is_private = call.is_private();
    const MoeWorkspace work(call, call.workspace,
                            is_private ? own.get<char>(MoeWorkspace(call, nullptr).own_bytes) : nullptr);
    for (int64_t first = 0; first < call.tokens; first += kPassTokens)
        moe_pass(team, call, first, std::min(kPassTokens, call.tokens - first), work);
}

}  // namespace moesaic

// `arguments` has no workspace. 1 when an id names no expert.
MOESAIC_EXPORT int64_t moesaic_packed_moe(const moesaic::MoeCall* arguments) try {
    using namespace moesaic;
    MoeCall call = *arguments;
    for (int64_t i = 0; i < call.tokens * call.top_k; ++i)
        if (call.expert_ids[i] >= call.num_experts) return 1;
    static thread_local Scratch workspace;
    call.workspace = workspace.get<char>(packed_moe_workspace(call) + 64);
    auto work_of = [&](const PackedMlp& mlp, int64_t rows) {
        return 2.0 * double(rows) * double(mlp.up.depth) * double(mlp.up.columns + mlp.down.depth);
    };
    double work = work_of(call.experts, call.tokens * call.top_k);
    if (call.residual) work += work_of(*call.residual, call.tokens);
    run_team(work, [&](Team& team) { packed_moe(team, call); });
    return 0;
} MOESAIC_NO_MEMORY
