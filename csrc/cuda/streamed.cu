// The regime `streamed`: row blocks of the N x N matrices, one after the other.
#include <algorithm>

#include "cuda/kernels/launchers.h"
#include "cuda/operator.h"
#include "cuda/runtime/workspace.h"

namespace icsd::cuda {
namespace {

std::int64_t round_up(std::int64_t count, std::int64_t by) { return (count + by - 1) / by * by; }

// The size of the row blocks and the workspace of a call.
template <class C>
struct StreamedPlan {
  std::int64_t rows = 0, pitch = 0;  // of a row block; whole tiles of every stage
  WorkspaceLayout layout;
  Array<C> row_blocks, for_teacher, inverse_norms, values, saved;

  StreamedPlan(const std::vector<Features>& stages, Shape shape, bool teacher_gradient, bool save) {
    const auto count = static_cast<std::int64_t>(stages.size()), samples = shape.groups * shape.samples;
    choose_rows(stages, shape, count + teacher_gradient);
    const std::int64_t block = shape.groups * rows * pitch;
    row_blocks = layout.add<C>(count * block);
    for_teacher = layout.add<C>(teacher_gradient ? block : 0);
    inverse_norms = layout.add<C>(count * samples);
    values = layout.add<C>((count - 1) * samples);
    saved = layout.add<C>(save ? 0 : samples * (count + kMaxStatistics * (count - 1)));
  }

 private:
  void choose_rows(const std::vector<Features>& stages, Shape shape, std::int64_t matrices) {
    std::int64_t tile = 1;
    for (const GramPlan& plan : plan_grams(stages, shape, sizeof(C) == sizeof(double)).stages) {
      tile = std::max<std::int64_t>(tile, plan.tile);
      pitch = std::max<std::int64_t>(pitch, plan.padded());
    }
    const std::int64_t row_bytes = std::max<std::int64_t>(1, matrices * shape.groups * pitch * sizeof(C));
    rows = std::clamp(row_block_bytes / row_bytes / tile * tile, tile, round_up(pitch, tile));
  }
};

template <class C>
StreamedArguments<C> streamed_arguments(Shape shape, const Spec& spec, const StreamedPlan<C>& plan, C* saved,
                                        bool teacher_gradient, void* workspace) {
  StreamedArguments<C> arguments{};
  arguments.students = static_cast<int>(spec.weights.size());
  for (int k = 0; k < arguments.students; ++k) arguments.weights[k] = static_cast<C>(spec.weights[k]);
  arguments.samples = static_cast<int>(shape.samples);
  arguments.rows = static_cast<int>(plan.rows);
  arguments.pitch = static_cast<int>(plan.pitch);
  arguments.groups = shape.groups;
  arguments.row_blocks = plan.row_blocks.in(workspace);
  arguments.for_teacher = teacher_gradient ? plan.for_teacher.in(workspace) : nullptr;
  arguments.saved = saved ? saved : plan.saved.in(workspace);
  arguments.inverse_norms = plan.inverse_norms.in(workspace);
  arguments.values = plan.values.in(workspace);
  arguments.eps = static_cast<C>(spec.eps);
  return arguments;
}

template <class C>
LossArguments<C> loss_arguments(Shape shape, const Spec& spec) {
  return {spec.parameters.data(), static_cast<C>(shape.samples), static_cast<C>(spec.eps)};
}

// Calls call() for each row block, after its Gram matrices were launched.
template <class C, class Call>
void for_each_row_block(StreamedArguments<C>& arguments, const std::vector<Features>& stages, Shape shape,
                        cudaStream_t stream, const Call& call) {
  for (std::int64_t first = 0; first < shape.samples; first += arguments.rows) {
    arguments.first = static_cast<int>(first);
    const RowBlock block{first, arguments.rows, arguments.pitch};
    launch_gram_row_block(stages, shape, block, arguments.row_blocks, stream);
    call();
  }
}

// Launches the gradients of the samples of a row block, from its rows of A.
template <class C>
void launch_gradients(const StreamedArguments<C>& arguments, const C* grad, const std::vector<Features>& stages,
                      const std::vector<Features>& outs, Shape shape, cudaStream_t stream) {
  std::vector<Product> products;
  const std::int64_t matrix = static_cast<std::int64_t>(arguments.rows) * arguments.pitch;
  for (std::size_t k = 0; k < stages.size(); ++k) {
    if (!outs[k].data) continue;
    Features out = outs[k];
    out.data = static_cast<char*>(out.data) + arguments.first * out.sample_stride * size_of(out.dtype);
    const std::int64_t group = static_cast<std::int64_t>(k) * shape.groups;
    const C* const norms = arguments.inverse_norms + group * shape.samples + arguments.first;
    products.push_back({arguments.row_blocks + group * matrix, matrix, norms, shape.samples, stages[k], out});
  }
  const std::int64_t rows = std::min<std::int64_t>(arguments.rows, shape.samples - arguments.first);
  launch_combine(products, shape, {rows, arguments.pitch, 1, sizeof(C) == sizeof(double)}, grad, stream);
}

}  // namespace

template <class C>
void distill_streamed(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved,
                      const Context& context) {
  if (shape.groups == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const StreamedPlan<C> plan(stages, shape, false, saved);
  auto arguments = streamed_arguments(shape, spec, plan, saved, false, context.allocate(plan.layout.bytes()));
  const LossArguments<C> of_loss = loss_arguments<C>(shape, spec);
  launch_norms(arguments, stages, spec.loss, of_loss, false, stream);
  for_each_row_block(arguments, stages, shape, stream,
                     [&] { launch_row_block_forward(arguments, spec.loss, of_loss, stream); });
  arguments.loss = loss;
  launch_sum_losses(arguments, stream);
}

template <class C>
void distill_streamed_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                               const std::vector<Features>& outs, Shape shape, const Spec& spec,
                               const Context& context) {
  if (shape.groups * shape.samples == 0) return;
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const bool teacher_gradient = outs.back().data;
  const StreamedPlan<C> plan(stages, shape, teacher_gradient, true);
  void* const workspace = context.allocate(plan.layout.bytes());
  auto arguments = streamed_arguments(shape, spec, plan, const_cast<C*>(saved), teacher_gradient, workspace);
  const LossArguments<C> of_loss = loss_arguments<C>(shape, spec);
  launch_norms(arguments, stages, spec.loss, of_loss, true, stream);
  for_each_row_block(arguments, stages, shape, stream, [&] {
    launch_row_block_backward(arguments, spec.loss, of_loss, stream);
    launch_gradients(arguments, grad, stages, outs, shape, stream);
  });
}

#define ICSD_INSTANTIATE(C)                                                                                    \
  template void distill_streamed<C>(const std::vector<Features>&, Shape, const Spec&, C*, C*, const Context&); \
  template void distill_streamed_backward<C>(const C*, const C*, const std::vector<Features>&,                 \
                                             const std::vector<Features>&, Shape, const Spec&, const Context&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
