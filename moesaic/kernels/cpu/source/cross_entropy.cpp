// Cross-entropy for PyTorch: the contract is in kernels/cross_entropy.py, the work in cross_entropy.h.

#include "cross_entropy.h"

#include "export.h"

using namespace moesaic;

// 0, or 1 + the number of the first token whose target is outside the vocabulary.
MOESAIC_EXPORT int64_t moesaic_cross_entropy(void* logits, int64_t is_bf16, const int64_t* targets, int64_t tokens,
                                             int64_t vocabulary, float* losses, int64_t wants_gradient) {
    for (int64_t token = 0; token < tokens; ++token)
        if (targets[token] != kIgnoredTarget && uint64_t(targets[token]) >= uint64_t(vocabulary)) return token + 1;
    const CrossEntropyArguments arguments{logits,     is_bf16 != 0, targets,       tokens,
                                          vocabulary, losses,       wants_gradient != 0};
    run_team(20.0 * double(tokens) * double(vocabulary), [&](Team& team) { cross_entropy(team, arguments); });
    return 0;
}
