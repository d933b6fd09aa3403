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
  arguments.tickets = arrays.tickets;
  return arguments;
}

template <class C>
CovarianceFinish<C> covariance_finish(Shape shape, const std::vector<double>& weights, const CovarianceArrays& arrays,
                                      C* loss) {
  CovarianceFinish<C> finish{};
  finish.students = static_cast<int>(weights.size());
  const double pairs = std::max(1.0, static_cast<double>(shape.samples) * shape.samples);
  for (int k = 0; k < finish.students; ++k) finish.weights[k] = weights[k] / pairs;
  finish.squares = arrays.squares;
  finish.tile_squares = arrays.tile_squares;
  finish.covariances = arrays.covariances;
  finish.tickets = arrays.tickets;
  finish.loss = loss;
  return finish;
}

template <class T>
void launch_inverse_norms(const CovarianceArguments<T>& arguments, std::int64_t stages, cudaStream_t stream) {
  const std::int64_t grid = divide_up(stages * arguments.groups * arguments.samples, kNormSamples);
  if (!grid) return;
  launch(compute_inverse_norms<T>, blocks(grid), kRowThreads, 0, stream, arguments, static_cast<int>(stages));
}

// Launches the products of a stage's type, one block for each tile and split.
template <class T>
void launch_products(const CovarianceArguments<T>& arguments, cudaStream_t stream) {
  const std::int64_t grid = arguments.groups * arguments.splits * arguments.matrices.tiles;
  if (!grid) return;
  const auto run = [&](auto kernel, auto tile) {
    using Tile = decltype(tile);
    constexpr std::size_t shared = CovarianceTiles<T, Tile>::kBytes;
    allow_shared(kernel, shared);
    launch_early(kernel, blocks(grid), Tile::kThreads, shared, stream, arguments);
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (has_tensor_cores()) return run(covariance_tensor<T>, CovarianceTensorShape{});
  }
  run(covariance_fma<T>, FmaTile<Compute<T>, false>{});
}

// Launches `finish_covariances`: a block for each group and, if products were not float64 already, for each tile and
// split.
template <class T>
void launch_finish(const CovarianceArguments<T>& arguments, const CovarianceFinish<Compute<T>>& finish,
                   cudaStream_t stream) {
  std::int64_t grid = arguments.groups;
  std::size_t shared = 0;
  if constexpr (!std::is_same_v<T, double>) {
    grid += arguments.groups * arguments.splits * arguments.matrices.tiles;
    shared = CovarianceTiles<T, FmaTile<double, false>>::kBytes;
  }
  allow_shared(finish_covariances<T>, shared);
  launch_early(finish_covariances<T>, blocks(grid), kRowThreads, shared, stream, arguments, finish);
}

// Returns how many splits of the samples take the least time. The multiprocessors take blocks in turns, each as long as
// a split has chunks. To add a partial tile to the others takes about 1/kSumCost of the time of a chunk.
std::int64_t covariance_splits(std::int64_t tiles, std::int64_t samples) {
  constexpr std::int64_t kSumCost = 64;
  const std::int64_t processors = multiprocessors(), chunks = divide_up(samples, kSplitStep);
  const std::int64_t most = std::min(divide_up(2 * processors, tiles), divide_up(samples, kShortSum));
  std::int64_t best = 1, least = 0;
  for (std::int64_t splits = 1; splits <= most; ++splits) {
    const std::int64_t turns = divide_up(tiles * splits, processors);
    const std::int64_t cost = kSumCost * turns * divide_up(chunks, splits) + tiles * splits;
    if (splits > 1 && cost >= least) continue;
    least = cost;
    best = splits;
  }
  return best;
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
  CovariancePlan plan{covariance_matrices(stages), 0, 1};
  const std::int64_t tiles = std::max<std::int64_t>(1, shape.groups * plan.matrices.tiles);
  plan.split_samples = divide_up(divide_up(shape.samples, covariance_splits(tiles, shape.samples)), kSplitStep);
  plan.split_samples = std::max<std::int64_t>(1, plan.split_samples) * kSplitStep;  // whole chunks
  plan.splits = std::max<std::int64_t>(1, divide_up(shape.samples, plan.split_samples));
  return plan;
}

template <class C>
void launch_covariances(const std::vector<Features>& stages, Shape shape, const Spec& spec, const CovariancePlan& plan,
                        const CovarianceArrays& arrays, C* loss, cudaStream_t stream) {
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      const auto arguments = covariance_arguments<T>(stages, shape, spec.eps, plan, arrays);
      launch_inverse_norms(arguments, static_cast<std::int64_t>(stages.size()), stream);
      launch_products(arguments, stream);
      const CovarianceSums<C> sums{plan.matrices, static_cast<const C*>(arrays.partials), arguments.splits,
                                   arrays.squares, arrays.covariances};
      const std::int64_t grid = shape.groups * plan.matrices.count * kSquareSplits;
      launch_early(sum_covariances<C>, blocks(grid), kRowThreads, 0, stream, sums);
      launch_finish(arguments, covariance_finish(shape, spec.weights, arrays, loss), stream);
    }
  });
}

template void launch_covariances<float>(const std::vector<Features>&, Shape, const Spec&, const CovariancePlan&,
                                        const CovarianceArrays&, float*, cudaStream_t);
template void launch_covariances<double>(const std::vector<Features>&, Shape, const Spec&, const CovariancePlan&,
                                         const CovarianceArrays&, double*, cudaStream_t);

}  // namespace icsd::cuda
