// The kernels for rows of N x N matrices, which run the losses of core/losses.h on whole vectors.
#pragma once

#include <cstdint>

#include "core/losses.h"

namespace icsd::cpu {

// A row of a Gram matrix as a row of similarities, S_j = own r_j K_j. For a loss of products, own and all r_j are 1.
template <class C>
struct SimilarityRow {
  const C* gram;
  const C* inverse_norms;
  C own;
};

// The statistics of the other rows, one array for each number, `stride` apart.
template <class C>
struct Statistics {
  const C* data;
  std::int64_t stride;
};

// The kernels of one loss. All take the columns [begin, end) of a row.
template <class C>
struct RowKernels {
  // Adds them to a Row<C>.
  void (*forward)(LossArguments<C> arguments, SimilarityRow<C> s, SimilarityRow<C> t, std::int64_t begin,
                  std::int64_t end, void* row);
  // Adds weight (dL/dS_ij + dL/dS_ji) to g_j, or the same of T. `own` has the statistics of row i.
  using Backward = void (*)(LossArguments<C> arguments, SimilarityRow<C> s, SimilarityRow<C> t, std::int64_t begin,
                            std::int64_t end, const C* own, Statistics<C> others, C weight, C* g);
  Backward student, teacher;
};

// Computes a_j = g_j r_j, in place or elsewhere, and returns Σ_j g_j S_j.
template <class C>
using ProjectKernel = C (*)(SimilarityRow<C> s, const C* g, std::int64_t begin, std::int64_t end, C* a);

template <class C>
struct AllRowKernels {
  RowKernels<C> of[kLosses], shifted_kl;
  ProjectKernel<C> project, project_narrow;  // with exact a_j, and with those that are rounded to bfloat16, or null
};

}  // namespace icsd::cpu
