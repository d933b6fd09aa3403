#include "cuda/kernels/centering.cuh"

#include "cuda/kernels/launchers.h"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {

void launch_center(const std::vector<Features>& stages, const std::vector<Features>& outs, Shape shape,
                   cudaStream_t stream) {
  for (int code = 0; code < kDTypes; ++code) {
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      CenterArguments<T> arguments{};
      arguments.samples = static_cast<int>(shape.samples);
      std::int64_t grid = 0;
      for (std::size_t k = 0; k < stages.size(); ++k) {
        const Features& x = stages[k];
        if (x.dtype != kDTypeOf<T>) continue;
        arguments.stages[arguments.count++] = {static_cast<const T*>(x.data),
                                               static_cast<Compute<T>*>(outs[k].data),
                                               x.dim,
                                               x.group_stride,
                                               x.sample_stride,
                                               blocks(grid)};
        grid += shape.groups * divide_up(x.dim, kCenterThreads);
      }
      if (grid) launch(center_features<T>, blocks(grid), kCenterThreads, 0, stream, arguments);
    });
  }
}

template <class C>
void launch_center_rows(const RowsArguments<C>& arguments, std::int64_t stages, C* means, cudaStream_t stream) {
  const std::int64_t rows = stages * arguments.groups * arguments.samples;
  if (!rows) return;
  launch_early(compute_row_means<C>, blocks(divide_up(rows, kBackwardThreads / 32)), kBackwardThreads, 0, stream,
               arguments, rows, means);
  launch_early(center_rows<C>, blocks(rows), kBackwardThreads, 0, stream, arguments, means);
}

template void launch_center_rows<float>(const RowsArguments<float>&, std::int64_t, float*, cudaStream_t);
template void launch_center_rows<double>(const RowsArguments<double>&, std::int64_t, double*, cudaStream_t);

}  // namespace icsd::cuda
