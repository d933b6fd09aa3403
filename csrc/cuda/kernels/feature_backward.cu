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

// The blocks of a launch with tiles of the given shape, and the workspace of each.
template <class T, class Tile>
struct FeatureBackwardPlan {
  std::int64_t items, blocks;
  std::size_t workspace;

  FeatureBackwardPlan(const std::vector<Features>& stages, Shape shape, std::int64_t targets)
      : items(targets * shape.groups * divide_up(shape.samples, Tile::kRows)),
        blocks(std::min<std::int64_t>(items, 2 * multiprocessors())),
        workspace(FeatureBackwardTiles<T, Tile>::workspace(largest_dim(stages))) {}
};

// Calls call(kernel, tile) with the kernel for features of type T and products of type C.
template <class T, class C, class Call>
void with_kernel(const Call& call) {
  if constexpr (std::is_same_v<C, float>) {
    if (has_tensor_cores()) return call(feature_backward_tensor<T>, FeatureBackwardTensorShape{});
  }
  call(feature_backward_fma<T, C>, FmaTile<C, true>{});
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
  std::size_t most = 0;
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    const auto add = [&](auto, auto tile) {
      const FeatureBackwardPlan<T, decltype(tile)> plan(stages, shape, static_cast<std::int64_t>(stages.size()));
      most = std::max(most, plan.blocks * plan.workspace);
    };
    with_kernel<T, Compute<T>>(add);
    with_kernel<T, double>(add);
  });
  return most;
}

template <class C>
void launch_feature_backward(const C* grad, const FeatureSaved<const double>& saved,
                             const std::vector<Features>& stages, const std::vector<Features>& outs, Shape shape,
                             const Spec& spec, void* workspace, cudaStream_t stream) {
  with_element(stages.back().dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      auto arguments = backward_arguments<T>(stages, outs, shape, spec);
      arguments.covariances = saved.covariances;
      arguments.inverse_norms = saved.inverse_norms;
      arguments.group_scale = grad;
      arguments.workspace = static_cast<unsigned char*>(workspace);
      const auto run = [&](auto kernel, auto tile) {
        using Tile = decltype(tile);
        const FeatureBackwardPlan<T, Tile> plan(stages, shape, arguments.target_count);
        if (!plan.blocks) return;
        arguments.items = plan.items;
        arguments.workspace_bytes = static_cast<std::int64_t>(plan.workspace);
        constexpr std::size_t shared = FeatureBackwardTiles<T, Tile>::kBytes;
        allow_shared(kernel, shared);
        launch_early(kernel, blocks(plan.blocks), Tile::kThreads, shared, stream, arguments);
      };
      if constexpr (!std::is_same_v<C, double>) {
        arguments.squares = saved.squares;
        with_kernel<T, C>(run);
      }
      with_kernel<T, double>(run);
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
