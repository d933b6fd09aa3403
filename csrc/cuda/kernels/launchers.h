// Launches of the kernels. Those that read the stages' features make one launch for every type among them.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "core/spec.h"
#include "cuda/kernels/matrices.cuh"
#include "cuda/operator.h"

namespace icsd::cuda {

// Gram matrices

// The division of a stage's Gram matrices into tiles and splits.
struct GramPlan {
  bool tensor_cores;
  int tile, tiles;         // rows of a tile; tiles along K
  std::int64_t split_dim;  // features of a split
  int splits;
  bool whole;          // one split of several tiles: the whole matrices are written to their place at once
  std::size_t offset;  // of the partial matrices in the workspace

  int padded() const { return tile * tiles; }
};

struct GramPlans {
  std::vector<GramPlan> stages;
  std::size_t bytes;
};

// The matrices are wanted in float64 or float32.
GramPlans plan_grams(const std::vector<Features>& stages, Shape shape, bool is_double);
// Launches the partial matrices, in `workspace`, and the whole ones, in `matrices`: (stages, groups, samples, pitch).
// If `first`, this is the first launch of the call, which is not early.
template <class C>
void launch_grams(const std::vector<Features>& stages, Shape shape, const GramPlans& plans, void* workspace,
                  C* matrices, std::int64_t pitch, bool first, cudaStream_t stream);

std::vector<Partials> partials_of(const std::vector<Features>& stages, const GramPlans& plans, const void* workspace);

template <class C>
void launch_sum_gram(const Partials& partials, Shape shape, C* out, cudaStream_t stream);

// Rows [first, first + rows) of the Gram matrices of all stages: (stages, groups, rows, pitch). They are whole tiles.
struct RowBlock {
  std::int64_t first, rows, pitch;
};
template <class C>
void launch_gram_row_block(const std::vector<Features>& stages, Shape shape, const RowBlock& block, C* out,
                           cudaStream_t stream);

// Centering

// Writes the samples minus the mean of their group to `outs`, (groups, samples, dim) in compute type.
void launch_center(const std::vector<Features>& stages, const std::vector<Features>& outs, Shape shape,
                   cudaStream_t stream);
// Centers the matrices of the gradients of the first `stages` stages. `means` has (stages, groups, samples) elements.
template <class C>
void launch_center_rows(const RowsArguments<C>& arguments, std::int64_t stages, C* means, cudaStream_t stream);

// The loss on rows

int statistics_of(LossKind kind);

// Launches `rows_forward` and `rows_backward`. Sets the fields that say how `rows_forward` works.
template <class C>
void launch_rows(RowsArguments<C> arguments, LossKind kind, const LossArguments<C>& loss_arguments, bool save,
                 cudaStream_t stream);

// If `known`, the squared norms in `saved` are read instead of the features.
template <class C>
void launch_norms(const StreamedArguments<C>& arguments, const std::vector<Features>& stages, LossKind kind,
                  const LossArguments<C>& loss_arguments, bool known, cudaStream_t stream);
template <class C>
void launch_row_block_forward(const StreamedArguments<C>& arguments, LossKind kind,
                              const LossArguments<C>& loss_arguments, cudaStream_t stream);
template <class C>
void launch_row_block_backward(const StreamedArguments<C>& arguments, LossKind kind,
                               const LossArguments<C>& loss_arguments, cudaStream_t stream);
template <class C>
void launch_sum_losses(const StreamedArguments<C>& arguments, cudaStream_t stream);

// Products of matrices with features

struct Product {
  const void* matrix;  // one for each group
  std::int64_t matrix_group_stride;
  const void* row_scale;  // or null
  std::int64_t scale_group_stride;
  Features x, out;
};

// The layout of the matrices of all products. They have a row for each output.
struct MatrixLayout {
  std::int64_t outputs, stride;
  std::int64_t scale_stride;  // from row scale to row scale
  bool is_double;             // matrices and scales are float64, else float32
};

// `group_scale` has one number for each group, or is null.
void launch_combine(const std::vector<Product>& products, Shape shape, const MatrixLayout& layout,
                    const void* group_scale, cudaStream_t stream);

// Feature space

CovarianceMatrices covariance_matrices(const std::vector<Features>& stages);

// The arrays that the forward pass saves, one after the other; see CovarianceArguments.
template <class D>
struct FeatureSaved {
  D *covariances, *squares, *inverse_norms;

  FeatureSaved(D* saved, const CovarianceMatrices& matrices, Shape shape)
      : covariances(saved),
        squares(covariances + shape.groups * matrices.elements),
        inverse_norms(squares + shape.groups * matrices.count * kSquareSplits) {}
};

// The division of the covariances into splits of the samples, at least one.
struct CovariancePlan {
  CovarianceMatrices matrices;
  std::int64_t split_samples, splits;
};
CovariancePlan plan_covariances(const std::vector<Features>& stages, Shape shape);

// Arrays of the forward pass, see CovarianceArguments and CovarianceFinish.
struct CovarianceArrays {
  double *inverse_norms, *covariances;
  void* partials;
  double *squares, *tile_squares;
  unsigned* tickets;
};
// Computes norms, covariances, their squares and the loss. Stages are of one type.
template <class C>
void launch_covariances(const std::vector<Features>& stages, Shape shape, const Spec& spec, const CovariancePlan& plan,
                        const CovarianceArrays& arrays, C* loss, cudaStream_t stream);

// Bytes that `launch_feature_backward` needs as `workspace`.
std::size_t feature_backward_bytes(const std::vector<Features>& stages, Shape shape);
template <class C>
void launch_feature_backward(const C* grad, const FeatureSaved<const double>& saved,
                             const std::vector<Features>& stages, const std::vector<Features>& outs, Shape shape,
                             const Spec& spec, void* workspace, cudaStream_t stream);

}  // namespace icsd::cuda
