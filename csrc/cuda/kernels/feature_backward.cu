#include <algorithm>
#include <type_traits>

#include "cuda/kernels/feature_backward.cuh"
#include "cuda/kernels/launchers.h"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

std::int64_t largest_dim(const std::vector<Features>& stages) {
  std::int64_t dim = 0;
  for (const Features& stage : stages) dim = std::max(dim, stage.dim);
  return dim;
}

constexpr std::int64_t kRows = FmaTile<double, true>::kRows;  // samples of a tile

// The tiles of samples of `targets` stages, and the blocks that take them in turns.
struct FeatureBackwardPlan {
  std::int64_t items, blocks;

  FeatureBackwardPlan(Shape shape, std::int64_t targets)
      : items(targets * shape.groups * divide_up(shape.samples, kRows)),
        blocks(std::min<std::int64_t>(items, 2 * multiprocessors())) {}
};

std::size_t workspace_of_block(const std::vector<Features>& stages) {
  return (kRows * largest_dim(stages) * sizeof(double) + 255) / 256 * 256;  // dL/dX̂
}

template <class T>
FeatureBackwardArguments<T> backward_arguments(const std::vector<Features>& stages, const std::vector<Features>& outs,
                                               Shape shape, const Spec& spec) {
  FeatureBackwardArguments<T> arguments{};
  describe_stages(stages, arguments.stages);
  for (std::size_t k = 0; k < stages.size(); ++k) {
    if (!outs[k].data || !outs[k].dim) continue;
    arguments.outs[k] = {static_cast<T*>(outs[k].data), outs[k].group_stride, outs[k].sample_stride};
    arguments.targets[arguments.target_count++] = static_cast<int>(k);
  }
  arguments.matrices = covariance_matrices(stages);
  arguments.students = static_cast<int>(stages.size()) - 1;
  for (int k = 0; k < arguments.students; ++k) {
    arguments.factors[k] = 4 * spec.weights[k] / (static_cast<double>(shape.samples) * shape.samples);
  }
  arguments.samples = static_cast<int>(shape.samples);
  arguments.groups = shape.groups;
  arguments.eps = spec.eps;
  return arguments;
}

}  // namespace

std::size_t feature_backward_bytes(const std::vector<Features>& stages, Shape shape) {
  const FeatureBackwardPlan plan(shape, static_cast<std::int64_t>(stages.size()));
  return plan.blocks * workspace_of_block(stages);
}

template <class C>
void launch_feature_backward(const C* grad, const FeatureSaved<const double>& saved,
                             const std::vector<Features>& stages, const std::vector<Features>& outs, Shape shape,
                             const Spec& spec, void* workspace, cudaStream_t stream) {
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      auto arguments = backward_arguments<T>(stages, outs, shape, spec);
      const FeatureBackwardPlan plan(shape, arguments.target_count);
      if (!plan.blocks) return;
      arguments.items = plan.items;
      arguments.covariances = saved.covariances;
      arguments.squares = saved.squares;
      arguments.inverse_norms = saved.inverse_norms;
      arguments.group_scale = grad;
      arguments.workspace = static_cast<unsigned char*>(workspace);
      arguments.workspace_bytes = static_cast<std::int64_t>(workspace_of_block(stages));
      const auto run = [&](auto kernel, auto shape_of_tile) {
        constexpr std::size_t shared = kFeatureBackwardShared<T, decltype(shape_of_tile)>;
        allow_shared(kernel, shared);
        launch_early(kernel, blocks(plan.blocks), shape_of_tile.kThreads, shared, stream, arguments);
      };
      if constexpr (!std::is_same_v<T, double>) {
        if (has_tensor_cores()) return run(feature_backward_tensor<T>, FeatureBackwardTensorShape{});
      }
      run(feature_backward_fma<T>, FmaTile<C, true>{});
    }
  });
}

template void launch_feature_backward<float>(const float*, const FeatureSaved<const double>&,
                                             const std::vector<Features>&, const std::vector<Features>&, Shape,
                                             const Spec&, void*, cudaStream_t);
template void launch_feature_backward<double>(const double*, const FeatureSaved<const double>&,
                                              const std::vector<Features>&, const std::vector<Features>&, Shape,
                                              const Spec&, void*, cudaStream_t);

}  // namespace icsd::cuda
