#include <algorithm>

#include "cuda/kernels/launchers.h"
#include "cuda/kernels/streamed_rows.cuh"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

template <class C>
unsigned blocks_of_rows(const StreamedArguments<C>& arguments) {
  return blocks(arguments.groups * std::min(arguments.rows, arguments.samples - arguments.first));
}

}  // namespace

template <class C>
void launch_norms(const StreamedArguments<C>& arguments, const std::vector<Features>& stages, LossKind kind,
                  const LossArguments<C>& loss_arguments, bool known, cudaStream_t stream) {
  const std::int64_t grid = divide_up(arguments.groups * arguments.samples, kNormThreads / 32);
  if (!grid) return;
  const bool similarities = with_loss(kind, [&](auto tag) {
    return static_cast<bool>(typename decltype(tag)::template Of<C>(loss_arguments).similarities);
  });
  for (std::size_t k = 0; k < stages.size(); ++k) {
    const Features& x = stages[k];
    with_element(x.dtype, [&](auto element) {
      using T = decltype(element);
      if constexpr (sizeof(Compute<T>) <= sizeof(C)) {
        const auto run = [&](auto... options) {
          launch_kernel(k > 0 && waits_for_previous(compute_norms<T, C>), compute_norms<T, C>, blocks(grid),
                        kNormThreads, 0, stream, arguments, options...);
        };
        run(static_cast<const T*>(x.data), x.dim, x.group_stride, x.sample_stride, static_cast<int>(k), similarities,
            known);
      }
    });
  }
}

template <class C>
void launch_row_block_forward(const StreamedArguments<C>& arguments, LossKind kind,
                              const LossArguments<C>& loss_arguments, cudaStream_t stream) {
  with_loss(kind, [&](auto tag) {
    using D = typename decltype(tag)::template Of<C>;
    launch_early(row_block_forward<C, D>, blocks_of_rows(arguments), kBackwardThreads, 0, stream, arguments,
                 D(loss_arguments));
  });
}

template <class C>
void launch_row_block_backward(const StreamedArguments<C>& arguments, LossKind kind,
                               const LossArguments<C>& loss_arguments, cudaStream_t stream) {
  with_loss(kind, [&](auto tag) {
    using D = typename decltype(tag)::template Of<C>;
    launch_early(row_block_backward<C, D>, blocks_of_rows(arguments), kBackwardThreads, 0, stream, arguments,
                 D(loss_arguments));
  });
}

template <class C>
void launch_sum_losses(const StreamedArguments<C>& arguments, cudaStream_t stream) {
  launch_early(sum_losses<C>, blocks(arguments.groups), kBackwardThreads, 0, stream, arguments);
}

#define ICSD_INSTANTIATE(C)                                                                                  \
  template void launch_norms<C>(const StreamedArguments<C>&, const std::vector<Features>&, LossKind,         \
                                const LossArguments<C>&, bool, cudaStream_t);                                \
  template void launch_row_block_forward<C>(const StreamedArguments<C>&, LossKind, const LossArguments<C>&,  \
                                            cudaStream_t);                                                   \
  template void launch_row_block_backward<C>(const StreamedArguments<C>&, LossKind, const LossArguments<C>&, \
                                             cudaStream_t);                                                  \
  template void launch_sum_losses<C>(const StreamedArguments<C>&, cudaStream_t);
ICSD_INSTANTIATE(float)
ICSD_INSTANTIATE(double)
#undef ICSD_INSTANTIATE

}  // namespace icsd::cuda
