// `mse` in feature space (core/moments.h).
#pragma once

#include <vector>

#include "core/moments.h"
#include "cpu/operator.h"

namespace icsd::cpu {

// As `distill`, for mse; `moments` (groups, feature_moments) or null.
template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* moments);

// The stages' gradients, from all stages; null data where none is wanted.
template <class C>
void distill_feature_backward(const C* grad, const double* moments, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec);

}  // namespace icsd::cpu
