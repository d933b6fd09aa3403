// `mse` in feature space (core/covariances.h).
#pragma once

#include <vector>

#include "core/covariance.h"
#include "cpu/sample.h"

namespace icsd::cpu {

// As `distill`, for mse; `covariances` (groups, covariance_elements) or null.
template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* covariances);

// The stages' gradients, from all stages; null data where none is wanted.
template <class C>
void distill_feature_backward(const C* grad, const double* covariances, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec);

}  // namespace icsd::cpu
