// The operator on the CPU: similarity matrices, losses and their gradients, from raw pointers.
#pragma once

#include <cstdint>
#include <vector>

#include "core/spec.h"
#include "cpu/kernels/norms.h"

namespace icsd::cpu {

// Matrices are of compute type C: double where a stage is float64, float elsewhere.
//
// A slot is a group's (samples) x (samples + 1) matrix [A | r], with r_i the inverse of the norm n_i (0 for a zero
// row), or 1 for a loss of products. For a stage with a gradient, dL/dX = diag(r) A X. For a teacher without one, A is
// its Gram matrix.

// K = X Xᵀ: (groups, samples, samples).
template <class C>
void gram(const Features& x, Shape shape, C* out);

// out = matrix x: (groups, outputs, samples) times (groups, samples, features).
template <class C>
void combine(const C* matrix, std::int64_t outputs, const Features& x, const Features& out, Shape shape);

// loss_b = Σ_k weight_k d(S(X_k), S(Y)), the teacher Y the last of the stages; `slots` (stages, groups, samples,
// samples + 1) receives what the gradient needs, or is null.
template <class C>
void distill_sample(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* slots);

// outs[k] = grad_b diag(r) A X_k from the slots of `distill`; null data where no gradient is wanted.
template <class C>
void distill_sample_backward(const C* grad, const C* slots, const std::vector<Features>& stages,
                             const std::vector<Features>& outs, Shape shape);

}  // namespace icsd::cpu
