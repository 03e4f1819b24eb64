// Cross-entropy for PyTorch: the contract is in kernels/cross_entropy.py, the work in cross_entropy.h.

#include "cross_entropy.h"

#include "export.h"
#include "linear_cross_entropy.h"

using namespace moesaic;

namespace {

// 0, or 1 + the number of the first token whose target is outside the vocabulary.
int64_t find_wrong(const int64_t* targets, int64_t tokens, int64_t vocabulary) {
    for (int64_t token = 0; token < tokens; ++token)
        if (targets[token] != kIgnoredTarget && uint64_t(targets[token]) >= uint64_t(vocabulary)) return token + 1;
    return 0;
}

}  // namespace

// 0, or 1 + the number of the first token whose target is outside the vocabulary.
MOESAIC_EXPORT int64_t moesaic_cross_entropy(void* logits, int64_t is_bf16, const int64_t* targets, int64_t tokens,
                                             int64_t vocabulary, float* losses, int64_t wants_gradient) try {
    if (const int64_t wrong = find_wrong(targets, tokens, vocabulary)) return wrong;
    const CrossEntropyArguments arguments{logits,     is_bf16 != 0, targets,       tokens,
                                          vocabulary, losses,       wants_gradient != 0};
    run_team(20.0 * double(tokens) * double(vocabulary), [&](Team& team) { cross_entropy(team, arguments); });
    return 0;
} MOESAIC_NO_MEMORY

// As above; grad_hidden and grad_weight are null where the losses are all that is wanted, grad_weight alone where the
// weights are frozen.
MOESAIC_EXPORT int64_t moesaic_linear_cross_entropy(const bf16* hidden, const bf16* weight, const int64_t* targets,
                                                    int64_t tokens, int64_t size, int64_t vocabulary, float* losses,
                                                    bf16* grad_hidden, float* grad_weight) try {
    if (const int64_t wrong = find_wrong(targets, tokens, vocabulary)) return wrong;
    if (!tokens && grad_weight) std::fill_n(grad_weight, vocabulary * size, 0.0f);
    thread_local Scratch shared;
    const LinearCrossEntropy arguments{hidden, weight, targets, tokens, size, vocabulary, losses, grad_hidden, grad_weight};
    LinearCrossEntropyScratch scratch{};
    scratch.place(arguments, shared.get<float>(scratch.place(arguments, nullptr)));
    run_team(2.0 * double(tokens) * double(size) * double(vocabulary),
             [&](Team& team) { linear_cross_entropy(team, arguments, scratch); });
    return 0;
} MOESAIC_NO_MEMORY
