#include <algorithm>
#include <type_traits>

#include "cuda/runtime/device.cuh"
#include "cuda/kernels/feature_backward.cuh"
#include "cuda/operator.h"

namespace icsd::cuda {
namespace {

CovarianceMatrices matrices_of(const std::vector<Features>& stages) {
  CovarianceMatrices matrices{};
  for (const Covariance& covariance : covariances_of(stages)) {
    matrices.of[matrices.count++] = {static_cast<int>(covariance.left),
                                     static_cast<int>(covariance.right),
                                     static_cast<int>(covariance.rows),
                                     static_cast<int>(covariance.columns),
                                     matrices.tiles,
                                     covariance.offset};
    const std::int64_t rows = divide_up(covariance.rows, kTileColumns), columns = divide_up(covariance.columns, kTileColumns);
    matrices.tiles += static_cast<int>(covariance.left == covariance.right ? rows * (rows + 1) / 2 : rows * columns);
  }
  matrices.elements = covariance_elements(stages);
  return matrices;
}

std::size_t aligned(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

// How the samples are shared out among blocks, and the workspace of the forward pass.
struct Plan {
  CovarianceMatrices matrices;
  std::int64_t share, splits;  // samples of a split; none if there are no samples
  std::size_t inverse_norms, partials, squares, close_squares, covariances, bytes = 0;

  Plan(const std::vector<Features>& stages, Shape shape, bool save) : matrices(matrices_of(stages)) {
    // As many blocks as fill the chip twice, but none of fewer samples than are summed without a pause.
    const std::int64_t tiles = std::max<std::int64_t>(1, shape.groups * matrices.tiles);
    const std::int64_t wanted = std::min(divide_up(2 * multiprocessors(), tiles), divide_up(shape.samples, kShortSum));
    share = divide_up(divide_up(shape.samples, std::max<std::int64_t>(1, wanted)), kShortSum) * kShortSum;
    splits = share ? divide_up(shape.samples, share) : 0;
    const std::size_t numbers = shape.groups * matrices.elements, parts = shape.groups * matrices.count * kSquareSplits;
    inverse_norms = take(stages.size() * shape.groups * shape.samples);
    partials = take(splits * numbers);
    squares = take(parts);
    close_squares = take(parts);
    covariances = take(save ? 0 : numbers);
  }

 private:
  std::size_t take(std::size_t doubles) {
    const std::size_t begin = bytes;
    bytes += aligned(doubles * sizeof(double));
    return begin;
  }
};

template <class T>
void describe(const std::vector<Features>& stages, FeatureStage<T>* to) {
  for (const Features& x : stages) {
    *to++ = {static_cast<const T*>(x.data), x.group_stride, x.sample_stride, static_cast<int>(x.dim),
             copy_bytes(x.data, x.group_stride, x.sample_stride, sizeof(T))};
  }
}

// Launches a kernel with more shared memory than it has by default.
template <class Kernel, class Arguments>
void launch_tiles(Kernel* kernel, std::int64_t grid, int threads, std::size_t shared, cudaStream_t stream,
                  const Arguments& arguments) {
  if (!grid) return;
  allow_shared(kernel, shared);
  launch(kernel, blocks(grid), threads, shared, stream, arguments);
}

// The covariances from products of type C, where `arguments` say.
template <class T, class C>
void launch_covariance(CovarianceArguments<T> arguments, double* squares, double* covariances, cudaStream_t stream) {
  const std::int64_t grid = arguments.groups * arguments.splits * arguments.matrices.tiles;
  const auto run = [&](auto kernel, auto tile) {
    using Tile = decltype(tile);
    launch_tiles(kernel, grid, Tile::kThreads, CovarianceTiles<T, Tile>::kBytes, stream, arguments);
  };
  bool tensor_cores = false;
  if constexpr (std::is_same_v<C, float>) {
    tensor_cores = has_tensor_cores();
    if (tensor_cores) run(covariance_tensor<T>, CovarianceTensorShape{});
  }
  if (!tensor_cores) run(covariance_fma<T, C>, FmaTile<C, false>{});
  const CovarianceSums<C> sums{arguments.matrices, static_cast<const C*>(arguments.partials), arguments.splits, arguments.squares,
                           squares, covariances};
  launch(sum_covariances<C>, blocks(arguments.groups * arguments.matrices.count * kSquareSplits), kRowThreads, 0, stream, sums);
}

std::int64_t widest(const std::vector<Features>& stages) {
  std::int64_t features = 0;
  for (const Features& stage : stages) features = std::max(features, stage.dim);
  return features;
}

// The blocks of a backward pass by tiles of that shape, and the scratch of all.
template <class T, class Tile>
struct FeatureBackwardPlan {
  std::int64_t items, blocks;
  std::size_t scratch;

  FeatureBackwardPlan(const std::vector<Features>& stages, Shape shape, std::int64_t targets)
      : items(targets * shape.groups * divide_up(shape.samples, Tile::kRows)),
        blocks(std::min<std::int64_t>(items, 2 * multiprocessors())),
        scratch(FeatureBackwardTiles<T, Tile>::workspace(static_cast<std::int64_t>(stages.size()), widest(stages))) {}
};

// call(kernel, tile) for those of type T that products of type C take.
template <class T, class C, class Call>
void with_backward_kernel(const Call& call) {
  if constexpr (std::is_same_v<C, float>) {
    if (has_tensor_cores()) return call(feature_backward_tensor<T>, FeatureBackwardTensorShape{});
  }
  call(feature_backward_fma<T, C>, FmaTile<C, true>{});
}

std::size_t squares_bytes(const std::vector<Features>& stages, Shape shape) {
  return aligned(shape.groups * matrices_of(stages).count * kSquareSplits * sizeof(double));
}

// The workspace of a backward pass.
std::size_t backward_bytes(const std::vector<Features>& stages, Shape shape) {
  std::size_t most = 0;
  const auto plan = [&](auto, auto tile, auto element) {
    const FeatureBackwardPlan<decltype(element), decltype(tile)> plan(stages, shape, static_cast<std::int64_t>(stages.size()));
    most = std::max(most, plan.blocks * plan.scratch);
  };
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    with_backward_kernel<T, Compute<T>>([&](auto kernel, auto tile) { plan(kernel, tile, element); });
    with_backward_kernel<T, double>([&](auto kernel, auto tile) { plan(kernel, tile, element); });
  });
  return squares_bytes(stages, shape) + most;
}

}  // namespace

template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* covariances,
                     const Context& context) {
  if (shape.groups == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const Plan plan(stages, shape, covariances);
  char* const workspace = static_cast<char*>(context.allocate(plan.bytes));
  const auto at = [&](std::size_t offset) { return reinterpret_cast<double*>(workspace + offset); };
  double *const squares = at(plan.squares), *close_squares = nullptr;
  if (!covariances) covariances = at(plan.covariances);
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      CovarianceArguments<T> arguments{};
      describe(stages, arguments.stages);
      arguments.matrices = plan.matrices;
      arguments.samples = static_cast<int>(shape.samples);
      arguments.split_samples = static_cast<int>(plan.share);
      arguments.splits = static_cast<int>(plan.splits);
      arguments.groups = shape.groups;
      arguments.inverse_norms = at(plan.inverse_norms);
      arguments.eps = spec.eps;
      arguments.partials = at(plan.partials);
      const int count = static_cast<int>(stages.size());
      const std::int64_t rows = count * shape.groups * shape.samples;
      if (rows) launch(compute_inverse_norms<T>, blocks(divide_up(rows, kRowThreads / 32)), kRowThreads, 0, stream, arguments, count);
      launch_covariance<T, C>(arguments, squares, covariances, stream);
      if constexpr (!std::is_same_v<C, double>) {
        arguments.squares = squares;
        close_squares = at(plan.close_squares);
        launch_covariance<T, double>(arguments, close_squares, covariances, stream);
      }
    }
  });
  FeatureLossArguments<C> arguments{};
  arguments.students = static_cast<int>(stages.size()) - 1;
  const double pairs = std::max(1.0, static_cast<double>(shape.samples) * shape.samples);
  for (int k = 0; k < arguments.students; ++k) arguments.weights[k] = spec.weights[k] / pairs;
  arguments.squares = squares;
  arguments.close = close_squares;
  arguments.loss = loss;
  launch(feature_loss<C>, blocks(shape.groups), 32, 0, stream, arguments);
}

template <class C>
void distill_feature_backward(const C* grad, const double* covariances, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec, const Context& context) {
  if (shape.groups * shape.samples == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  void* const workspace = context.allocate(backward_bytes(stages, shape));
  double* const squares = static_cast<double*>(workspace);
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      FeatureBackwardArguments<T> arguments{};
      describe(stages, arguments.stages);
      for (std::size_t k = 0; k < stages.size(); ++k) {
        if (!outs[k].data || !outs[k].dim) continue;
        arguments.outs[k] = {static_cast<T*>(outs[k].data), outs[k].group_stride, outs[k].sample_stride};
        arguments.targets[arguments.target_count++] = static_cast<int>(k);
      }
      arguments.matrices = matrices_of(stages);
      arguments.students = static_cast<int>(stages.size()) - 1;
      for (int k = 0; k < arguments.students; ++k) {
        arguments.factors[k] = 4 * spec.weights[k] / (static_cast<double>(shape.samples) * shape.samples);
      }
      arguments.samples = static_cast<int>(shape.samples);
      arguments.groups = shape.groups;
      arguments.covariances = covariances;
      arguments.group_scale = grad;
      arguments.eps = spec.eps;
      arguments.workspace = static_cast<unsigned char*>(workspace) + squares_bytes(stages, shape);
      const auto run = [&](auto kernel, auto tile) {
        using Tile = decltype(tile);
        const FeatureBackwardPlan<T, Tile> plan(stages, shape, arguments.target_count);
        arguments.items = plan.items;
        arguments.workspace_bytes = static_cast<std::int64_t>(plan.scratch);
        launch_tiles(kernel, plan.blocks, Tile::kThreads, FeatureBackwardTiles<T, Tile>::kBytes, stream, arguments);
      };
      if constexpr (!std::is_same_v<C, double>) {
        arguments.squares = squares;
        const CovarianceSums<double> sums{arguments.matrices, covariances, 1, nullptr, squares, nullptr};
        launch(sum_covariances<double>, blocks(shape.groups * arguments.matrices.count * kSquareSplits), kRowThreads, 0, stream, sums);
        with_backward_kernel<T, C>(run);
      }
      with_backward_kernel<T, double>(run);
    }
  });
}

#define ICSD_INSTANTIATE(C)                                                                                               \
  template void distill_feature<C>(const std::vector<Features>&, Shape, const Spec&, C*, double*, const Context&); \
  template void distill_feature_backward<C>(const C*, const double*, const std::vector<Features>&,                        \
                                            const std::vector<Features>&, Shape, const Spec&, const Context&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
