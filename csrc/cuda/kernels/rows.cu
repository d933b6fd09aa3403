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

// Returns how many threads add the splits of one element.
int sum_threads(int splits) {
  int threads = 1;
  while (threads < kMaxSumThreads && 2 * threads <= splits) threads *= 2;
  return threads;
}

// Launches `rows_forward`. The inverse norms of the samples are computed in its shared memory. If that is too small, or
// if whole matrices have no row of diagonal elements that it could read instead, a kernel writes them first.
template <class C, class D>
void launch_forward(RowsArguments<C> arguments, const D& loss, cudaStream_t stream) {
  const Shape shape{arguments.groups, arguments.samples};
  const std::int64_t stages = arguments.students + 1;
  arguments.block_rows = rows_per_block(shape);
  std::size_t shared = stages * arguments.samples * sizeof(C);
  arguments.norms_in_shared = shared <= dynamic_shared_limit(rows_forward<C, D>);
  arguments.norms_known = !arguments.norms_in_shared;
  int splits = 1;
  for (int k = 0; k < stages; ++k) {
    arguments.norms_known |= !arguments.partials[k].data;
    splits = std::max(splits, arguments.partials[k].splits);
  }
  arguments.sum_threads = sum_threads(splits);
  if (arguments.norms_known) {
    launch_early(norms_forward<C>, blocks(divide_up(stages * shape.groups * shape.samples, kForwardThreads)),
                 kForwardThreads, 0, stream, arguments, static_cast<bool>(loss.similarities));
  }
  if (!arguments.norms_in_shared) shared = 0;
  launch_early(rows_forward<C, D>, row_blocks(shape, arguments.block_rows), kForwardThreads, shared, stream, arguments,
               loss);
}

}  // namespace

template <class C>
void launch_sum_gram(const Partials& partials, Shape shape, C* out, cudaStream_t stream) {
  const int rows = rows_per_block(shape);
  launch_early(sum_gram<C>, row_blocks(shape, rows), kForwardThreads, 0, stream, partials,
               static_cast<int>(shape.samples), rows, sum_threads(partials.splits), out);
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
    launch_early(rows_backward<C, D>, blocks(arguments.groups * (save ? 1 + arguments.samples : 1)), kBackwardThreads,
                 shared, stream, arguments, loss);
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
