#include "cuda/apply.cuh"

#include "cuda/device.cuh"
#include "cuda/launchers.h"

namespace icsd::cuda {

void launch_apply(const std::vector<Product>& products, Shape shape, std::int64_t outputs, std::int64_t matrix_stride,
                  bool wide, const void* group_scale, cudaStream_t stream) {
  for (int code = 0; code < kDTypes; ++code) {
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      ApplyArguments<T> arguments{};
      arguments.outputs = static_cast<int>(outputs);
      arguments.samples = static_cast<int>(shape.samples);
      arguments.matrix_stride = static_cast<int>(matrix_stride);
      arguments.wide = wide;
      arguments.group_scale = group_scale;
      std::int64_t grid = 0;
      for (const Product& p : products) {
        if (p.x.dtype != static_cast<DType>(code)) continue;
        arguments.stages[arguments.count++] = {static_cast<const T*>(p.x.data),
                                               static_cast<T*>(p.out.data),
                                               p.x.features,
                                               p.x.group_stride,
                                               p.x.sample_stride,
                                               p.out.group_stride,
                                               p.out.sample_stride,
                                               p.matrix,
                                               p.row_scale,
                                               p.matrix_group_stride,
                                               blocks(grid)};
        grid += shape.groups * ((outputs + kFmaTile - 1) / kFmaTile) * ((p.x.features + kFmaTile - 1) / kFmaTile);
      }
      if (grid) launch(apply_fma<T>, blocks(grid), 256, 0, stream, arguments);
    });
  }
}

}  // namespace icsd::cuda
