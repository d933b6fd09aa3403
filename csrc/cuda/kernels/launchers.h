// Launches of the kernels. Each makes one launch for every element type among the stages.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "cuda/kernels/matrices.cuh"
#include "cuda/operator.h"

namespace icsd::cuda {

// The division of a stage's Gram matrices into tiles and splits.
struct GramPlan {
  bool tensor_cores;
  int tile, tiles;         // rows of a tile; tiles along K
  std::int64_t split_dim;  // features of a split
  int splits;
  std::size_t offset;  // of the partial matrices in the workspace

  int padded() const { return tile * tiles; }
};

struct GramPlans {
  std::vector<GramPlan> stages;
  std::size_t bytes;
};

GramPlans plan_grams(const std::vector<Features>& stages, Shape shape);
void launch_grams(const std::vector<Features>& stages, Shape shape, const GramPlans& plans, char* workspace,
                  cudaStream_t stream);

// Computes rows [first, first + rows) of all stages' Gram matrices, which must be whole tiles: (stages, groups, rows, pitch).
template <class C>
void launch_gram_row_block(const std::vector<Features>& stages, Shape shape, std::int64_t first, std::int64_t rows,
                           std::int64_t pitch, C* row_blocks, cudaStream_t stream);

std::vector<Partials> partials_of(const std::vector<Features>& stages, const GramPlans& plans, const char* workspace);

template <class C>
void launch_sum_gram(const Partials& partials, Shape shape, C* out, cudaStream_t stream);

// Launches `rows_forward` and `rows_backward`; `block_rows` of the arguments is set here.
template <class C>
void launch_rows(RowsArguments<C> arguments, LossKind kind, const LossArguments<C>& of, bool save, cudaStream_t stream);
int statistics_of(LossKind kind);

// One product of `launch_combine`, with a matrix for each group.
struct Product {
  const void* matrix;
  std::int64_t matrix_group_stride;
  const void* row_scale;  // or null
  std::int64_t scale_group_stride;
  Features x, out;
};
void launch_combine(const std::vector<Product>& products, Shape shape, std::int64_t outputs, std::int64_t matrix_stride,
                    std::int64_t scale_stride, bool is_double, const void* group_scale, cudaStream_t stream);

}  // namespace icsd::cuda
