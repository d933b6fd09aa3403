// The launches that the operator is made of, one kernel each for every element type among the stages.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "cuda/matrices.cuh"
#include "cuda/operator.h"

namespace icsd::cuda {

// How a stage's Gram matrices are shared out among blocks.
struct GramPlan {
  bool tensor_cores;
  int side, sides;     // of the ranges of samples
  std::int64_t share;  // features of a split
  int splits;
  std::size_t offset;  // of the partial matrices in the workspace

  int padded() const { return side * sides; }
};

struct GramPlans {
  std::vector<GramPlan> stages;
  std::size_t bytes;
};

GramPlans plan_grams(const std::vector<Features>& stages, Shape shape);
void launch_grams(const std::vector<Features>& stages, Shape shape, const GramPlans& plans, char* workspace,
                  cudaStream_t stream);

// Rows [first, first + rows) of all stages' Gram matrices, whole ranges of samples: (stages, groups, rows, pitch).
template <class C>
void launch_band(const std::vector<Features>& stages, Shape shape, std::int64_t first, std::int64_t rows,
                 std::int64_t pitch, C* bands, cudaStream_t stream);

std::vector<Partials> partials_of(const std::vector<Features>& stages, const GramPlans& plans, const char* workspace);

template <class C>
void launch_sum_gram(const Partials& partials, Shape shape, C* out, cudaStream_t stream);

// `measure` and `differentiate`, whose arguments lack the band.
template <class C>
void launch_epilogue(EpilogueArguments<C> arguments, LossKind kind, const LossArguments<C>& of, bool save,
                     cudaStream_t stream);
int statistics_of(LossKind kind);

// One product of `launch_apply`: a matrix for each group.
struct Product {
  const void* matrix;
  std::int64_t matrix_group_stride;
  const void* row_scale;  // or null
  std::int64_t scale_group_stride;
  Features x, out;
};
void launch_apply(const std::vector<Product>& products, Shape shape, std::int64_t outputs, std::int64_t matrix_stride,
                  std::int64_t scale_stride, bool wide, const void* group_scale, cudaStream_t stream);

}  // namespace icsd::cuda
