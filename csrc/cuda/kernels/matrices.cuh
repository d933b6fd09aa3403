// The matrices of a call: layouts and arguments that kernels and their launches share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/losses.h"
#include "cuda/operator.h"

namespace icsd::cuda {

// Index of K_ij, j <= i, in a partial matrix: the rows of the lower triangle one after the other, then the diagonal as
// row N.
inline __host__ __device__ std::int64_t packed(std::int64_t i, std::int64_t j) { return i * (i + 1) / 2 + j; }
inline __host__ __device__ std::int64_t packed_size(std::int64_t samples) { return packed(samples, samples); }

// The partial Gram matrices of a stage, in float64 or float32. There are none if the whole matrices were written to
// their place at once.
struct Partials {
  const void* data;  // (groups, splits, packed_size), or null
  int splits;
  bool is_double;
};

template <class C>
struct RowsArguments {
  Partials partials[kMaxStages];  // of the students, then of the teacher
  C weights[kMaxStages];
  int students, samples;
  int block_rows;   // rows of K that a block of the forward kernel takes
  int sum_threads;  // threads that add the partial matrices of one element
  std::int64_t groups;
  int pitch;         // of the saved matrices
  C* saved;          // (stages, groups, samples, pitch)
  C* inverse_norms;  // (stages, groups, samples)
  C* values;         // (students, groups, samples)
  C* statistics;     // (statistics, students, groups, samples)
  C* loss;           // (groups)
  C eps;
  bool teacher_gradient;
  bool norms_known;      // `inverse_norms` has those of all samples already
  bool norms_in_shared;  // the forward kernel has room for those of all stages

  __device__ std::int64_t index(int stage, std::int64_t group, int i) const {
    return (stage * groups + group) * samples + i;
  }
  __device__ C* row(int stage, std::int64_t group, int i) const { return saved + index(stage, group, i) * pitch; }
  __device__ std::int64_t rows() const { return students * groups * samples; }
};

// Arguments of the kernels on row blocks.
template <class C>
struct StreamedArguments {
  C weights[kMaxStages];
  int students, samples;
  int first, rows;  // of the row block
  int pitch;        // from row to row
  std::int64_t groups;
  C* row_blocks;     // K or A: (stages, groups, rows, pitch)
  C* for_teacher;    // dL/dT_ij + dL/dT_ji: (groups, rows, pitch), or null if the teacher has no gradient
  C* saved;          // (groups, ...): squared norms (stages, samples), statistics (students, kMaxStatistics, samples)
  C* inverse_norms;  // (stages, groups, samples)
  C* values;         // (students, groups, samples)
  C* loss;           // (groups)
  C eps;

  __device__ std::int64_t index(int stage, std::int64_t group, int i) const {
    return (stage * groups + group) * samples + i;
  }
  // Returns row i of the matrix, which must be in the row block.
  __device__ C* row(int stage, std::int64_t group, int i) const {
    return row_blocks + ((stage * groups + group) * rows + (i - first)) * pitch;
  }
  __device__ C* saved_of(std::int64_t group) const {
    return saved + group * samples * (students + 1 + kMaxStatistics * students);
  }
  __device__ C* statistics(int student, std::int64_t group) const {
    return saved_of(group) + static_cast<std::int64_t>(students + 1 + kMaxStatistics * student) * samples;
  }
};

constexpr int kMaxCovariances = 2 * kMaxStages - 1;

struct CovarianceMatrix {
  int left, right;  // stages; if they are the same, only tiles up to the diagonal are computed
  int rows, columns, first_tile;
  std::int64_t offset;
};

struct CovarianceMatrices {
  CovarianceMatrix of[kMaxCovariances];  // two for every student, then one for the teacher
  int count, tiles;
  std::int64_t elements;  // of all matrices of a group

  __device__ int students() const { return count / 2; }
};

}  // namespace icsd::cuda
