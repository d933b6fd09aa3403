// `mse` of many samples by way of the products of their features: with X̂ the samples of norm 1,
//   |X̂X̂ᵀ - ŶŶᵀ|² = |X̂ᵀX̂|² - 2 |X̂ᵀŶ|² + |ŶᵀŶ|²,    d/dX̂ = 4 (X̂ (X̂ᵀX̂) - Ŷ (ŶᵀX̂)),
// so that no matrix has more than D x D elements.
//
// The three terms cancel as S approaches T. Products of float32 are summed in float64; where less than kLeastRemainder of
// the terms remains, loss and gradient are computed again from products in float64.
#pragma once

#include <vector>

#include "cpu/operator.h"

namespace icsd::cpu {

constexpr double kLeastRemainder = 1e-2;

// Numbers that the backward pass needs of a group, the moments: of every student X̂ᵀX̂ (D, D) and X̂ᵀŶ (D, D_teacher), then
// ŶᵀŶ.
inline std::int64_t feature_moments(const std::vector<Features>& stages) {
  const std::int64_t teacher = stages.back().features;
  std::int64_t numbers = teacher * teacher;
  for (std::size_t k = 0; k + 1 < stages.size(); ++k) numbers += stages[k].features * (stages[k].features + teacher);
  return numbers;
}

// As `distill`, for mse; `moments` (groups, feature_moments) or null.
template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Distillation& how, C* loss, double* moments);

// The stages' gradients, from all stages; null data where none is wanted.
template <class C>
void distill_feature_backward(const C* grad, const double* moments, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Distillation& how);

}  // namespace icsd::cpu
