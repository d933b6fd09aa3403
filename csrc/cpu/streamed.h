// Distillation of many samples: the N x N matrices are computed block by block and never stored as a whole.
#pragma once

#include <vector>

#include "cpu/sample.h"

namespace icsd::cpu {

// Returns the number of elements that are saved for a group: the squared norms of the samples of all stages (stages,
// N), then the statistics of the rows of every student (students, kMaxStatistics, N), zeros where a loss has fewer.
inline std::int64_t streamed_elements(std::int64_t stages, std::int64_t samples) {
  return samples * (stages + kMaxStatistics * (stages - 1));
}

// Computes the loss of each group. `saved` (groups, streamed_elements) receives what the backward pass needs, or is
// null.
template <class C>
void distill_streamed(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved);

// Computes the gradients of the stages whose `outs` have data.
template <class C>
void distill_streamed_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                               const std::vector<Features>& outs, Shape shape, const Spec& spec);

}  // namespace icsd::cpu
