// The operator in sample space on the CPU: Gram matrices, losses and their gradients.
#pragma once

#include <cstdint>
#include <vector>

#include "core/spec.h"
#include "cpu/kernels/norms.h"

namespace icsd::cpu {

// Matrices are of compute type C: double if an input is float64, else float.
//
// The forward pass saves, for each stage and group, the samples x (samples + 1) matrix [A | r]. r_i is the inverse of
// the norm n_i, 0 for a zero row, or 1 for a loss of products. The gradient of a stage is dL/dX = diag(r) A X. For a
// teacher without a gradient, A is its Gram matrix. If the samples are centered, r is 1 and A is H M H, with H = I -
// 1/N and dL/d(X - mean) = M (X - mean).

// Computes K = X Xᵀ, (groups, samples, samples).
template <class C>
void gram(const Features& x, Shape shape, C* out);

// Computes out = matrix x, (groups, outputs, samples) times (groups, samples, dim).
template <class C>
void combine(const C* matrix, std::int64_t outputs, const Features& x, const Features& out, Shape shape);

// Computes loss_b = Σ_k weight_k d(S(X_k), S(Y)). The teacher Y is the last of the stages. `saved` (stages, groups,
// samples, samples + 1) receives what the backward pass needs, or is null.
template <class C>
void distill_sample(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved);

// Computes outs[k] = grad_b diag(r) A X_k for the stages whose `outs` have data.
template <class C>
void distill_sample_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                             const std::vector<Features>& outs, Shape shape);

}  // namespace icsd::cpu
