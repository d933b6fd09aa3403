#include <algorithm>

#include "cuda/kernels/launchers.h"
#include "cuda/kernels/rows.cuh"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

// Returns how many rows each block takes: few enough that all multiprocessors have some.
int rows_per_block(Shape shape) {
  return static_cast<int>(std::clamp<std::int64_t>(shape.groups * shape.samples / multiprocessors(), 1, kMaxBlockRows));
}

unsigned row_blocks(Shape shape, int block_rows) { return blocks(shape.groups * divide_up(shape.samples, block_rows)); }

// Launches `rows_forward`. The inverse norms of two stages' samples are in shared memory if they fit, else a kernel
// writes those of all stages first.
template <class C, class D>
void launch_forward(RowsArguments<C> arguments, const D& loss, cudaStream_t stream) {
  const Shape shape{arguments.groups, arguments.samples};
  arguments.block_rows = rows_per_block(shape);
  std::size_t shared = 2 * arguments.samples * sizeof(C);
  arguments.norms_known = shared > dynamic_shared_limit(rows_forward<C, D>);
  if (arguments.norms_known) {
    const std::int64_t norms = (arguments.students + 1) * shape.groups * shape.samples;
    launch(norms_forward<C>, blocks(divide_up(norms, kForwardThreads)), kForwardThreads, 0, stream, arguments,
           static_cast<bool>(loss.similarities));
    shared = 0;
  }
  launch(rows_forward<C, D>, row_blocks(shape, arguments.block_rows), kForwardThreads, shared, stream, arguments, loss);
}

}  // namespace

template <class C>
void launch_sum_gram(const Partials& partials, Shape shape, C* out, cudaStream_t stream) {
  const int rows = rows_per_block(shape);
  launch(sum_gram<C>, row_blocks(shape, rows), kForwardThreads, 0, stream, partials, static_cast<int>(shape.samples),
         rows, out);
}

template <class C>
void launch_rows(RowsArguments<C> arguments, LossKind kind, const LossArguments<C>& of, bool save,
                 cudaStream_t stream) {
  with_loss(kind, [&](auto tag) {
    using D = typename decltype(tag)::template Of<C>;
    const D loss(of);
    if (arguments.samples) launch_forward(arguments, loss, stream);
    const std::size_t shared = arguments.teacher_gradient ? arguments.samples * sizeof(C) : 0;
    allow_shared(rows_backward<C, D>, shared);
    launch(rows_backward<C, D>, blocks(arguments.groups * (save ? 1 + arguments.samples : 1)), kBackwardThreads, shared,
           stream, arguments, loss);
  });
}

int statistics_of(LossKind kind) {
  return with_loss(kind, [](auto tag) { return decltype(tag)::template Of<float>::kStatistics; });
}

#define ICSD_INSTANTIATE(C)                                                   \
  template void launch_sum_gram<C>(const Partials&, Shape, C*, cudaStream_t); \
  template void launch_rows<C>(RowsArguments<C>, LossKind, const LossArguments<C>&, bool, cudaStream_t);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
