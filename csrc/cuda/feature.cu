// The regime `feature`: `mse` on D x D matrices instead of N x N matrices (core/covariance.h).
#include <type_traits>

#include "cuda/kernels/launchers.h"
#include "cuda/operator.h"
#include "cuda/runtime/workspace.h"

namespace icsd::cuda {
namespace {

std::int64_t count_squares(const CovarianceMatrices& matrices, Shape shape) {
  return shape.groups * matrices.count * kSquareSplits;
}

// The workspace of the forward pass. The covariances are part of it if they are not saved for the backward pass.
struct FeatureWorkspace {
  WorkspaceLayout layout;
  Array<double> inverse_norms, partials, squares, close_squares, covariances;

  FeatureWorkspace(const CovariancePlan& plan, std::int64_t stages, Shape shape, bool save) {
    const std::int64_t elements = shape.groups * plan.matrices.elements;
    inverse_norms = layout.add<double>(stages * shape.groups * shape.samples);
    partials = layout.add<double>(plan.splits * elements);
    squares = layout.add<double>(count_squares(plan.matrices, shape));
    close_squares = layout.add<double>(count_squares(plan.matrices, shape));
    covariances = layout.add<double>(save ? 0 : elements);
  }
};

}  // namespace

template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* covariances,
                     const Context& context) {
  if (shape.groups == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const CovariancePlan plan = plan_covariances(stages, shape);
  const FeatureWorkspace places(plan, static_cast<std::int64_t>(stages.size()), shape, covariances);
  void* const workspace = context.allocate(places.layout.bytes());
  const CovarianceArrays arrays{places.inverse_norms.in(workspace),
                                covariances ? covariances : places.covariances.in(workspace),
                                places.partials.in(workspace), places.squares.in(workspace),
                                std::is_same_v<C, double> ? nullptr : places.close_squares.in(workspace)};
  launch_covariances(stages, shape, spec.eps, plan, arrays, stream);
  launch_feature_loss(spec.weights, shape, arrays, loss, stream);
}

template <class C>
void distill_feature_backward(const C* grad, const double* covariances, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec,
                              const Context& context) {
  if (shape.groups * shape.samples == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const CovarianceMatrices matrices = covariance_matrices(stages);
  WorkspaceLayout layout;
  const Array<double> squares = layout.add<double>(count_squares(matrices, shape));
  const Array<char> blocks = layout.add<char>(static_cast<std::int64_t>(feature_backward_bytes(stages, shape)));
  void* const workspace = context.allocate(layout.bytes());
  if (!std::is_same_v<C, double>) launch_sum_squares(matrices, shape, covariances, squares.in(workspace), stream);
  launch_feature_backward(grad, covariances, squares.in(workspace), stages, outs, shape, spec, blocks.in(workspace),
                          stream);
}

#define ICSD_INSTANTIATE(C)                                                                                        \
  template void distill_feature<C>(const std::vector<Features>&, Shape, const Spec&, C*, double*, const Context&); \
  template void distill_feature_backward<C>(const C*, const double*, const std::vector<Features>&,                 \
                                            const std::vector<Features>&, Shape, const Spec&, const Context&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
