// `mse` in feature space, see core/covariance.h.
#pragma once

#include <vector>

#include "core/covariance.h"
#include "cpu/sample.h"

namespace icsd::cpu {

// Computes the loss of each group. `covariances` (groups, covariance_elements) receives what the backward pass needs,
// or is null.
template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* covariances);

// Computes the gradients of the stages whose `outs` have data.
template <class C>
void distill_feature_backward(const C* grad, const double* covariances, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec);

}  // namespace icsd::cpu
