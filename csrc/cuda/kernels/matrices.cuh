// Layouts of the N x N matrices of a call, from partial Gram matrices to [A | r].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/operator.h"

namespace icsd::cuda {

// Index of K_ij, j <= i, in a partial matrix: the rows of the lower triangle one after the other, then the diagonal as
// row N.
inline __host__ __device__ std::int64_t packed(std::int64_t i, std::int64_t j) { return i * (i + 1) / 2 + j; }
inline __host__ __device__ std::int64_t packed_size(std::int64_t samples) { return packed(samples, samples); }

// The partial Gram matrices of a stage, in float64 or float32.
struct Partials {
  const void* data;  // (groups, splits, packed_size)
  int splits;
  bool is_double;
};

template <class C>
struct RowsArguments {
  Partials partials[kMaxStages];  // of the students, then of the teacher
  C weights[kMaxStages];
  int students, samples, block_rows;  // rows of K that a block of the forward kernel takes
  std::int64_t groups;
  C* saved;          // (stages, groups, samples, samples + 1)
  C* inverse_norms;  // (stages, groups, samples)
  C* values;         // (students, groups, samples)
  C* statistics;     // (statistics, students, groups, samples)
  C* loss;           // (groups)
  C eps;
  bool teacher_gradient;
  bool norms_known;  // `inverse_norms` has those of all samples already

  __device__ std::int64_t index(int stage, std::int64_t group, int i) const {
    return (stage * groups + group) * samples + i;
  }
  __device__ C* row(int stage, std::int64_t group, int i) const { return saved + index(stage, group, i) * (samples + 1); }
  __device__ std::int64_t rows() const { return students * groups * samples; }
};

}  // namespace icsd::cuda
