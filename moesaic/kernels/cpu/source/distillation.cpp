// A student's loss at the head for PyTorch: the contract is in kernels/distillation.py, the work in distillation.h.

#include "distillation.h"

#include "export.h"

using namespace moesaic;

// 0, or 1 + the number of the first token whose target is outside the vocabulary.
MOESAIC_EXPORT int64_t moesaic_distillation(void* logits, int64_t is_bf16, const float* teacher, const int64_t* targets,
                                            int64_t tokens, int64_t vocabulary, const float* alpha_and_temperature,
                                            float* losses, float* distances) try {
    for (int64_t token = 0; token < tokens; ++token)
        if (targets[token] != kIgnoredTarget && uint64_t(targets[token]) >= uint64_t(vocabulary)) return token + 1;
    const DistillationArguments arguments{logits,     is_bf16 != 0, teacher,   targets, tokens, vocabulary,
                                          alpha_and_temperature[0], alpha_and_temperature[1], losses, distances};
    run_team(60.0 * double(tokens) * double(vocabulary), [&](Team& team) { distillation(team, arguments); });
    return 0;
} MOESAIC_NO_MEMORY
