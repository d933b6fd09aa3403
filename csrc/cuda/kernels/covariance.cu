#include <algorithm>
#include <type_traits>

#include "core/covariance.h"
#include "cuda/kernels/covariance.cuh"
#include "cuda/kernels/launchers.h"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

template <class T>
CovarianceArguments<T> covariance_arguments(const std::vector<Features>& stages, Shape shape, double eps,
                                            const CovariancePlan& plan, const CovarianceArrays& arrays) {
  CovarianceArguments<T> arguments{};
  describe_stages(stages, arguments.stages);
  arguments.matrices = plan.matrices;
  arguments.samples = static_cast<int>(shape.samples);
  arguments.split_samples = static_cast<int>(plan.split_samples);
  arguments.splits = static_cast<int>(plan.splits);
  arguments.groups = shape.groups;
  arguments.inverse_norms = arrays.inverse_norms;
  arguments.eps = eps;
  arguments.partials = arrays.partials;
  return arguments;
}

template <class T>
void launch_inverse_norms(const CovarianceArguments<T>& arguments, std::int64_t stages, cudaStream_t stream) {
  const std::int64_t grid = divide_up(stages * arguments.groups * arguments.samples, kRowThreads / 32);
  if (!grid) return;
  launch(compute_inverse_norms<T>, blocks(grid), kRowThreads, 0, stream, arguments, static_cast<int>(stages));
}

template <class C>
void launch_sum(const CovarianceSums<C>& sums, std::int64_t groups, cudaStream_t stream) {
  const std::int64_t grid = groups * sums.matrices.count * kSquareSplits;
  launch_early(sum_covariances<C>, blocks(grid), kRowThreads, 0, stream, sums);
}

// Computes the covariances from products of type C, and `squares` from them. If the arguments have squares, only groups
// that cancel are computed.
template <class T, class C>
void launch_products(const CovarianceArguments<T>& arguments, double* squares, double* covariances,
                     cudaStream_t stream) {
  const std::int64_t grid = arguments.groups * arguments.splits * arguments.matrices.tiles;
  const auto run = [&](auto kernel, auto tile) {
    using Tile = decltype(tile);
    constexpr std::size_t shared = CovarianceTiles<T, Tile>::kBytes;
    allow_shared(kernel, shared);
    launch_early(kernel, blocks(grid), Tile::kThreads, shared, stream, arguments);
  };
  bool tensor_cores = false;
  if constexpr (std::is_same_v<C, float>) {
    tensor_cores = has_tensor_cores();
    if (grid && tensor_cores) run(covariance_tensor<T>, CovarianceTensorShape{});
  }
  if (grid && !tensor_cores) run(covariance_fma<T, C>, FmaTile<C, false>{});
  launch_sum<C>({arguments.matrices, static_cast<const C*>(arguments.partials), arguments.splits, arguments.squares,
                 squares, covariances},
                arguments.groups, stream);
}

}  // namespace

CovarianceMatrices covariance_matrices(const std::vector<Features>& stages) {
  CovarianceMatrices matrices{};
  for (const Covariance& covariance : covariances_of(stages)) {
    matrices.of[matrices.count++] = {static_cast<int>(covariance.left),
                                     static_cast<int>(covariance.right),
                                     static_cast<int>(covariance.rows),
                                     static_cast<int>(covariance.columns),
                                     matrices.tiles,
                                     covariance.offset};
    const std::int64_t rows = divide_up(covariance.rows, kTileColumns);
    const std::int64_t columns = divide_up(covariance.columns, kTileColumns);
    const bool symmetric = covariance.left == covariance.right;
    matrices.tiles += static_cast<int>(symmetric ? rows * (rows + 1) / 2 : rows * columns);
  }
  matrices.elements = covariance_elements(stages);
  return matrices;
}

CovariancePlan plan_covariances(const std::vector<Features>& stages, Shape shape) {
  CovariancePlan plan{covariance_matrices(stages), 0, 0};
  // There are as many blocks as fill the device twice, but none of fewer samples than a short sum has. Splits are whole
  // chunks.
  const std::int64_t tiles = std::max<std::int64_t>(1, shape.groups * plan.matrices.tiles);
  const std::int64_t wanted = std::min(divide_up(2 * multiprocessors(), tiles), divide_up(shape.samples, kShortSum));
  const std::int64_t samples = divide_up(shape.samples, std::max<std::int64_t>(1, wanted));
  plan.split_samples = divide_up(samples, kSplitStep) * kSplitStep;
  if (plan.split_samples) plan.splits = divide_up(shape.samples, plan.split_samples);
  return plan;
}

void launch_covariances(const std::vector<Features>& stages, Shape shape, double eps, const CovariancePlan& plan,
                        const CovarianceArrays& arrays, cudaStream_t stream) {
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    auto arguments = covariance_arguments<T>(stages, shape, eps, plan, arrays);
    launch_inverse_norms(arguments, static_cast<std::int64_t>(stages.size()), stream);
    launch_products<T, Compute<T>>(arguments, arrays.squares, arrays.covariances, stream);
    if constexpr (!std::is_same_v<T, double>) {
      arguments.squares = arrays.squares;
      launch_products<T, double>(arguments, arrays.close_squares, arrays.covariances, stream);
    }
  });
}

template <class C>
void launch_feature_loss(const std::vector<double>& weights, Shape shape, const CovarianceArrays& arrays, C* loss,
                         cudaStream_t stream) {
  FeatureLossArguments<C> arguments{};
  arguments.students = static_cast<int>(weights.size());
  const double pairs = std::max(1.0, static_cast<double>(shape.samples) * shape.samples);
  for (int k = 0; k < arguments.students; ++k) arguments.weights[k] = weights[k] / pairs;
  arguments.squares = arrays.squares;
  arguments.close = arrays.close_squares;
  arguments.loss = loss;
  launch_early(feature_loss<C>, blocks(shape.groups), 32, 0, stream, arguments);
}

template void launch_feature_loss<float>(const std::vector<double>&, Shape, const CovarianceArrays&, float*,
                                         cudaStream_t);
template void launch_feature_loss<double>(const std::vector<double>&, Shape, const CovarianceArrays&, double*,
                                          cudaStream_t);

}  // namespace icsd::cuda
