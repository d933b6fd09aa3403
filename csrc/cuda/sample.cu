// The regime `sample`: whole N x N matrices. Besides, the two public products, `gram` and `combine`.
#include "cuda/kernels/launchers.h"
#include "cuda/operator.h"
#include "cuda/runtime/workspace.h"

namespace icsd::cuda {
namespace {

// The features that are compared: those of the stages, or centered ones in compute type, without memory yet.
std::vector<Features> compared_features(std::vector<Features> stages, Shape shape, bool center) {
  if (!center) return stages;
  for (Features& x : stages) {
    const DType dtype = x.dtype == DType::float64 ? DType::float64 : DType::float32;
    x = {nullptr, dtype, x.dim, shape.samples * x.dim, x.dim};
  }
  return stages;
}

// The workspace of the forward pass. The matrices are part of it if nothing is saved for the backward pass.
template <class C>
struct SampleArrays {
  WorkspaceLayout layout;
  std::vector<Array<char>> centered;  // of each stage; none if nothing is centered
  Array<char> partials;
  Array<C> inverse_norms, values, statistics, saved, means;

  SampleArrays(const std::vector<Features>& compared, const GramPlans& plans, Shape shape, const Spec& spec,
               bool save) {
    for (const Features& x : compared) {
      if (!spec.center) break;
      const auto size = static_cast<std::int64_t>(size_of(x.dtype));
      centered.push_back(layout.add<char>(shape.groups * shape.samples * x.dim * size));
    }
    const auto stages = static_cast<std::int64_t>(plans.stages.size()), rows = shape.groups * shape.samples;
    partials = layout.add<char>(plans.bytes);
    inverse_norms = layout.add<C>(stages * rows);
    values = layout.add<C>((stages - 1) * rows);
    statistics = layout.add<C>((stages - 1) * rows * statistics_of(spec.loss));
    saved = layout.add<C>(save ? 0 : stages * rows * saved_pitch(shape.samples));
    means = layout.add<C>(save && spec.center ? stages * rows : 0);
  }
};

template <class C>
RowsArguments<C> rows_arguments(const std::vector<Partials>& partials, Shape shape, const Spec& spec) {
  RowsArguments<C> arguments{};
  arguments.students = static_cast<int>(partials.size()) - 1;
  for (std::size_t k = 0; k < partials.size(); ++k) arguments.partials[k] = partials[k];
  for (int k = 0; k < arguments.students; ++k) arguments.weights[k] = static_cast<C>(spec.weights[k]);
  arguments.samples = static_cast<int>(shape.samples);
  arguments.pitch = static_cast<int>(saved_pitch(shape.samples));
  arguments.groups = shape.groups;
  arguments.eps = static_cast<C>(spec.eps);
  arguments.teacher_gradient = spec.teacher_gradient;
  return arguments;
}

}  // namespace

template <class C>
void gram(const Features& x, Shape shape, C* out, const Context& context) {
  if (shape.groups * shape.samples == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const GramPlans plans = plan_grams({x}, shape, sizeof(C) == sizeof(double));
  void* const workspace = plans.bytes ? context.allocate(plans.bytes) : nullptr;
  launch_grams<C>({x}, shape, plans, workspace, out, shape.samples, true, stream);
  const Partials partials = partials_of({x}, plans, workspace)[0];
  if (partials.data) launch_sum_gram<C>(partials, shape, out, stream);
}

template <class C>
void combine(const C* matrix, std::int64_t outputs, const Features& x, const Features& out, Shape shape,
             const Context& context) {
  const Product product{matrix, outputs * shape.samples, nullptr, 0, x, out};
  const MatrixLayout layout{outputs, shape.samples, 0, sizeof(C) == sizeof(double)};
  launch_combine({product}, shape, layout, nullptr, static_cast<cudaStream_t>(context.stream));
}

template <class C>
void distill_sample(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved,
                    const Context& context) {
  if (shape.groups == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  std::vector<Features> compared = compared_features(stages, shape, spec.center);
  const GramPlans plans = plan_grams(compared, shape, sizeof(C) == sizeof(double));
  const SampleArrays<C> arrays(compared, plans, shape, spec, saved);
  void* const workspace = context.allocate(arrays.layout.bytes());
  void* const partials = arrays.partials.in(workspace);
  for (std::size_t k = 0; k < arrays.centered.size(); ++k) compared[k].data = arrays.centered[k].in(workspace);
  if (shape.samples && spec.center) launch_center(stages, compared, shape, stream);
  RowsArguments<C> arguments = rows_arguments<C>(partials_of(compared, plans, partials), shape, spec);
  arguments.saved = saved ? saved : arrays.saved.in(workspace);
  if (shape.samples) {
    launch_grams(compared, shape, plans, partials, arguments.saved, arguments.pitch, !spec.center, stream);
  }
  arguments.inverse_norms = arrays.inverse_norms.in(workspace);
  arguments.values = arrays.values.in(workspace);
  arguments.statistics = arrays.statistics.in(workspace);
  arguments.loss = loss;
  const LossArguments<C> loss_arguments{spec.parameters.data(), static_cast<C>(shape.samples), arguments.eps};
  launch_rows<C>(arguments, spec.loss, loss_arguments, saved, stream);
  if (saved && spec.center) {
    launch_center_rows(arguments, arguments.students + spec.teacher_gradient, arrays.means.in(workspace), stream);
  }
}

template <class C>
void distill_sample_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                             const std::vector<Features>& outs, Shape shape, const Context& context) {
  const std::int64_t n = shape.samples, pitch = saved_pitch(n), size = n * pitch;
  std::vector<Product> products;
  for (std::size_t k = 0; k < outs.size(); ++k) {
    const C* matrix = saved + static_cast<std::int64_t>(k) * shape.groups * size;
    if (outs[k].data) products.push_back({matrix, size, matrix + n, size, stages[k], outs[k]});
  }
  const MatrixLayout layout{n, pitch, pitch, sizeof(C) == sizeof(double)};
  launch_combine(products, shape, layout, grad, static_cast<cudaStream_t>(context.stream));
}

#define ICSD_INSTANTIATE(C)                                                                                  \
  template void gram<C>(const Features&, Shape, C*, const Context&);                                         \
  template void combine<C>(const C*, std::int64_t, const Features&, const Features&, Shape, const Context&); \
  template void distill_sample<C>(const std::vector<Features>&, Shape, const Spec&, C*, C*, const Context&); \
  template void distill_sample_backward<C>(const C*, const C*, const std::vector<Features>&,                 \
                                           const std::vector<Features>&, Shape, const Context&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
