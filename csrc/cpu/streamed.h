// Distillation of many samples: the N x N matrices are made a block at a time, used and forgotten.
#pragma once

#include <vector>

#include "cpu/sample.h"

namespace icsd::cpu {

// Numbers that the backward pass needs of a group: the squared norms of all stages' samples (stages, N), then of every
// student kMaxStatistics numbers of its rows (students, kMaxStatistics, N), zeros where a loss has fewer.
inline std::int64_t streamed_elements(std::int64_t stages, std::int64_t samples) {
  return samples * (stages + kMaxStatistics * (stages - 1));
}

// As `distill`; `saved` (groups, streamed_elements) or null.
template <class C>
void distill_streamed(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved);

// The stages' gradients, from all stages; null data where none is wanted.
template <class C>
void distill_streamed_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                               const std::vector<Features>& outs, Shape shape, const Spec& spec);

}  // namespace icsd::cpu
