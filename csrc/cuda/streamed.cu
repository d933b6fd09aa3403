#include "cuda/kernels/streamed_rows.cuh"

#include <algorithm>

#include "cuda/runtime/device.cuh"
#include "cuda/kernels/launchers.h"

namespace icsd::cuda {
namespace {

// The bands of a call and its workspace.
template <class C>
struct Plan {
  std::int64_t rows, pitch;  // of a band; whole ranges of samples of every stage
  std::size_t bands, for_teacher, inverse_norms, values, saved, bytes;

  Plan(const std::vector<Features>& stages, Shape shape, bool teacher_gradient, bool save)
      : rows(0), pitch(0), bytes(0) {
    std::int64_t unit = 1;
    for (const GramPlan& plan : plan_grams(stages, shape).stages) {
      unit = std::max<std::int64_t>(unit, plan.tile);
      pitch = std::max<std::int64_t>(pitch, plan.padded());
    }
    const std::int64_t matrices = static_cast<std::int64_t>(stages.size()) + teacher_gradient;
    const std::int64_t row = std::max<std::int64_t>(1, matrices * shape.groups * pitch * sizeof(C));
    rows = std::clamp<std::int64_t>(row_block_bytes / row / unit, 1, divide_up(pitch, unit)) * unit;
    const std::int64_t band = shape.groups * rows * pitch, samples = shape.groups * shape.samples;
    const std::int64_t count = static_cast<std::int64_t>(stages.size());
    bands = take(count * band);
    for_teacher = take(teacher_gradient ? band : 0);
    inverse_norms = take(count * samples);
    values = take((count - 1) * samples);
    saved = take(save ? 0 : samples * (count + kMaxStatistics * (count - 1)));
  }

 private:
  std::size_t take(std::int64_t elements) {
    const std::size_t begin = bytes;
    bytes += divide_up(elements * sizeof(C), 256) * 256;
    return begin;
  }
};

// Both passes: the norms, then `call(arguments)` for every band with its Gram matrices.
template <class C, class Call>
void for_each_row_block(const std::vector<Features>& stages, Shape shape, const Spec& spec, const Plan<C>& plan,
                   C* saved, bool known, bool teacher_gradient, const Context& context, const Call& call) {
  const auto stream = static_cast<cudaStream_t>(context.stream);
  char* const workspace = static_cast<char*>(context.allocate(plan.bytes));
  const auto at = [&](std::size_t offset) { return reinterpret_cast<C*>(workspace + offset); };
  const int students = static_cast<int>(stages.size()) - 1;
  StreamedArguments<C> arguments{};
  for (int k = 0; k < students; ++k) arguments.weights[k] = static_cast<C>(spec.weights[k]);
  arguments.students = students;
  arguments.samples = static_cast<int>(shape.samples);
  arguments.rows = static_cast<int>(plan.rows);
  arguments.pitch = static_cast<int>(plan.pitch);
  arguments.groups = shape.groups;
  arguments.row_blocks = at(plan.bands);
  arguments.for_teacher = teacher_gradient ? at(plan.for_teacher) : nullptr;
  arguments.saved = saved ? saved : at(plan.saved);
  arguments.inverse_norms = at(plan.inverse_norms);
  arguments.values = at(plan.values);
  arguments.eps = static_cast<C>(spec.eps);
  const LossArguments<C> of{spec.parameters.data(), static_cast<C>(shape.samples), arguments.eps};
  with_loss(spec.loss, [&](auto tag) {
    using D = typename decltype(tag)::template Of<C>;
    const D loss(of);
    for (int k = 0; k <= students; ++k) {
      with_element(stages[k].dtype, [&](auto element) {
        using T = decltype(element);
        const unsigned grid = blocks(divide_up(shape.groups * shape.samples, kNormThreads / 32));
        if (!grid) return;
        if constexpr (sizeof(Compute<T>) <= sizeof(C)) {
          launch(compute_norms<T, C>, grid, kNormThreads, 0, stream, arguments, static_cast<const T*>(stages[k].data),
                 stages[k].dim, stages[k].group_stride, stages[k].sample_stride, k,
                 static_cast<bool>(loss.similarities), known);
        }
      });
    }
    for (std::int64_t first = 0; first < shape.samples; first += plan.rows) {
      arguments.first = static_cast<int>(first);
      launch_gram_row_block(stages, shape, first, plan.rows, plan.pitch, arguments.row_blocks, stream);
      const std::int64_t rows = std::min(plan.rows, shape.samples - first);
      call(arguments, loss, rows);
    }
  });
  if (!known && shape.groups) call.finish(arguments);
}

// What the passes do with a band.
template <class C>
struct Measure {
  C* loss;
  cudaStream_t stream;

  template <class D>
  void operator()(const StreamedArguments<C>& arguments, const D& loss, std::int64_t rows) const {
    launch(row_block_forward<C, D>, blocks(arguments.groups * rows), kBackwardThreads, 0, stream, arguments, loss);
  }
  void finish(StreamedArguments<C> arguments) const {
    arguments.loss = loss;
    launch(sum_losses<C>, blocks(arguments.groups), kBackwardThreads, 0, stream, arguments);
  }
};

template <class C>
struct Differentiate {
  const std::vector<Features>& stages;
  const std::vector<Features>& outs;
  Shape shape;
  const C* grad;
  cudaStream_t stream;

  template <class D>
  void operator()(const StreamedArguments<C>& arguments, const D& loss, std::int64_t rows) const {
    launch(row_block_backward<C, D>, blocks(arguments.groups * rows), kBackwardThreads, 0, stream, arguments, loss);
    std::vector<Product> products;
    const std::int64_t matrix = static_cast<std::int64_t>(arguments.rows) * arguments.pitch;
    for (std::size_t k = 0; k < stages.size(); ++k) {
      if (!outs[k].data) continue;
      Features out = outs[k];
      out.data = static_cast<char*>(out.data) + arguments.first * out.sample_stride * size_of(out.dtype);
      products.push_back({arguments.row_blocks + static_cast<std::int64_t>(k) * shape.groups * matrix, matrix,
                          arguments.inverse_norms + static_cast<std::int64_t>(k) * shape.groups * shape.samples + arguments.first,
                          shape.samples, stages[k], out});
    }
    launch_combine(products, shape, rows, arguments.pitch, 1, sizeof(C) == 8, grad, stream);
  }
  void finish(const StreamedArguments<C>&) const {}
};

}  // namespace

template <class C>
void distill_streamed(const std::vector<Features>& stages, Shape shape, const Spec& spec, C* loss, C* saved,
                      const Context& context) {
  if (shape.groups == 0) return;
  const Plan<C> plan(stages, shape, false, saved);
  for_each_row_block<C>(stages, shape, spec, plan, saved, false, false, context,
                   Measure<C>{loss, static_cast<cudaStream_t>(context.stream)});
}

template <class C>
void distill_streamed_backward(const C* grad, const C* saved, const std::vector<Features>& stages,
                               const std::vector<Features>& outs, Shape shape, const Spec& spec,
                               const Context& context) {
  if (shape.groups * shape.samples == 0) return;
  const bool teacher_gradient = outs.back().data;
  const Plan<C> plan(stages, shape, teacher_gradient, true);
  for_each_row_block<C>(stages, shape, spec, plan, const_cast<C*>(saved), true, teacher_gradient, context,
                   Differentiate<C>{stages, outs, shape, grad, static_cast<cudaStream_t>(context.stream)});
}

#define ICSD_INSTANTIATE(C)                                                                                    \
  template void distill_streamed<C>(const std::vector<Features>&, Shape, const Spec&, C*, C*, const Context&); \
  template void distill_streamed_backward<C>(const C*, const C*, const std::vector<Features>&,                 \
                                             const std::vector<Features>&, Shape, const Spec&, const Context&);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
