// The regime `feature`: `mse` on D x D matrices instead of N x N matrices (core/covariance.h).
#include "cuda/kernels/launchers.h"
#include "cuda/operator.h"
#include "cuda/runtime/workspace.h"

namespace icsd::cuda {
namespace {

// The workspace of the forward pass. The saved arrays are part of it if nothing is saved for the backward pass.
struct FeatureWorkspace {
  WorkspaceLayout layout;
  Array<double> partials, tile_squares, saved;
  Array<unsigned> tickets;

  FeatureWorkspace(const CovariancePlan& plan, const std::vector<Features>& stages, Shape shape, bool save) {
    partials = layout.add<double>(plan.splits * shape.groups * plan.matrices.elements);
    tile_squares = layout.add<double>(shape.groups * plan.matrices.tiles * 2);
    tickets = layout.add<unsigned>(shape.groups * (plan.matrices.tiles + 1));
    saved = layout.add<double>(save ? 0 : shape.groups * feature_elements(stages, shape.samples));
  }
};

}  // namespace

template <class C>
void distill_feature(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, double* saved,
                     const Context& context) {
  if (shape.groups == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const CovariancePlan plan = plan_covariances(stages, shape);
  const FeatureWorkspace places(plan, stages, shape, saved);
  void* const workspace = context.allocate(places.layout.bytes());
  const FeatureSaved<double> to(saved ? saved : places.saved.in(workspace), plan.matrices, shape);
  const CovarianceArrays arrays{to.inverse_norms,
                                to.covariances,
                                places.partials.in(workspace),
                                to.squares,
                                places.tile_squares.in(workspace),
                                places.tickets.in(workspace)};
  launch_covariances(stages, shape, spec, plan, arrays, loss, stream);
}

template <class C>
void distill_feature_backward(const C* grad, const double* saved, const std::vector<Features>& stages,
                              const std::vector<Features>& outs, Shape shape, const Spec& spec,
                              const Context& context) {
  if (shape.groups * shape.samples == 0) return;
  const FeatureSaved<const double> from(saved, covariance_matrices(stages), shape);
  void* const workspace = context.allocate(feature_backward_bytes(stages, shape));
  launch_feature_backward(grad, from, stages, outs, shape, spec, workspace, static_cast<cudaStream_t>(context.stream));
}

#define ICSD_INSTANTIATE(C)                                                                                        \
  template void distill_feature<C>(const std::vector<Features>&, Shape, const Spec&, C*, double*, const Context&); \
  template void distill_feature_backward<C>(const C*, const double*, const std::vector<Features>&,                 \
                                            const std::vector<Features>&, Shape, const Spec&, const Context&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
