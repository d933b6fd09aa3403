// Where the N x N matrices of a call are, from partial sums to [A | r].
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/operator.h"

namespace icsd::cuda {

// Where a partial matrix has K_ij, j <= i: the rows of the lower triangle, one after the other, and as row N its diagonal.
inline __host__ __device__ std::int64_t packed(std::int64_t i, std::int64_t j) { return i * (i + 1) / 2 + j; }
inline __host__ __device__ std::int64_t packed_size(std::int64_t samples) { return packed(samples, samples); }

// The partial matrices of a stage, float64 or float32.
struct Partials {
  const void* data;  // (groups, splits, packed_size)
  int splits;
  bool wide;
};

template <class C>
struct EpilogueArguments {
  Partials partials[kMaxStages];  // of the students and, last, the teacher
  C weights[kMaxStages];
  int students, samples, band;
  std::int64_t groups;
  C* slots;          // (stages, groups, samples, samples + 1)
  C* inverse_norms;  // (stages, groups, samples)
  C* values;         // (students, groups, samples)
  C* statistics;     // (numbers, students, groups, samples)
  C* loss;           // (groups)
  C eps;
  bool teacher_gradient;

  __device__ std::int64_t index(int stage, std::int64_t group, int i) const {
    return (stage * groups + group) * samples + i;
  }
  __device__ C* row(int stage, std::int64_t group, int i) const { return slots + index(stage, group, i) * (samples + 1); }
  __device__ std::int64_t rows() const { return students * groups * samples; }
};

}  // namespace icsd::cuda
