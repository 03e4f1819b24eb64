#include "moe_training.h"

#include "export.h"

namespace moesaic {
namespace {

// Parts of one buffer, each aligned to 64 bytes.
class Carver {
  public:
    template <typename T>
    void add(T*& pointer, int64_t count) {
        places_.push_back({reinterpret_cast<void**>(&pointer), total_});
        total_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    }
    void place(Scratch& buffer) {
        char* base = buffer.get<char>(size_t(total_));
        for (auto& [pointer, offset] : places_) *pointer = base + offset;
    }

  private:
    struct Place {
        void** pointer;
        int64_t offset;
    };
    std::vector<Place> places_;
    int64_t total_ = 64;
};

thread_local Scratch shared;

double work(const MoeTraining& m) { return 6.0 * double(m.rows) * double(m.hidden) * double(m.inner); }

MoeTrainingScratch prepare(const MoeTraining& m, bool backward) {
    MoeTrainingScratch s;
    s.groups = training::make_groups(m, omp_get_max_threads());
    int64_t lanes = 0, rows = 0, contracted = 0;
    for (const auto& group : s.groups) {
        lanes = std::max(lanes, group.lanes);
        rows = std::max(rows, group.rows);
        contracted = std::max(contracted, group.contracted);
    }
    Carver carver;
    if (m.combines()) carver.add(s.row_weights, m.rows);
    if (m.routes > 1) carver.add(s.sums, m.rows * m.hidden);
    if (backward) {
        carver.add(s.gradients, rows * training::row_stride(m.hidden));
        carver.add(s.contracted_gradients, contracted * m.hidden);
        carver.add(s.tokens_paired, rows / 2 * m.hidden);
        carver.add(s.grad_pre, rows * m.pre_width());
        if (!kHasTiles) {
            carver.add(s.contracted_grad_pre, rows / 2 * m.pre_width());
            carver.add(s.hidden_paired, rows / 2 * m.inner);
        }
        if (m.combines()) carver.add(s.partial_weights, training::parts_of_weights(m.inner) * m.rows);
    } else {
        carver.add(s.tokens, lanes * m.hidden / 2);
        carver.add(s.hidden, lanes * m.inner / 2);
    }
    carver.place(shared);
    return s;
}

}  // namespace
}  // namespace moesaic

MOESAIC_EXPORT int64_t moesaic_moe_training_forward(const moesaic::MoeTraining* m) try {
    const moesaic::MoeTrainingScratch scratch = moesaic::prepare(*m, false);
    moesaic::run_team(moesaic::work(*m), [&](moesaic::Team& team) { moe_training_forward(team, *m, scratch); });
    return 0;
} MOESAIC_NO_MEMORY

MOESAIC_EXPORT int64_t moesaic_moe_training_backward(const moesaic::MoeTraining* m) try {
    const moesaic::MoeTrainingScratch scratch = moesaic::prepare(*m, true);
    moesaic::run_team(2 * moesaic::work(*m), [&](moesaic::Team& team) { moe_training_backward(team, *m, scratch); });
    return 0;
} MOESAIC_NO_MEMORY
