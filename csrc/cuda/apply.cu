#include "cuda/apply.cuh"

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launchers.h"

namespace icsd::cuda {

void launch_apply(const std::vector<Product>& products, Shape shape, std::int64_t outputs, std::int64_t matrix_stride,
                  bool wide, const void* group_scale, cudaStream_t stream) {
  for (int code = 0; code < kDTypes; ++code) {
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      const bool tensor_cores = !std::is_same_v<T, double> && has_tensor_cores();
      const ApplyTiles<T> tiles = ApplyTiles<T>::of(static_cast<int>(outputs));
      const std::int64_t tile_outputs = tensor_cores ? tiles.outputs() : kFmaTile;
      const std::int64_t tile_features = tensor_cores ? tiles.features() : kFmaTile;
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
                                               blocks(grid),
                                               copy_bytes(p.x.data, p.x.group_stride, p.x.sample_stride, sizeof(T)),
                                               copy_bytes(p.out.data, p.out.group_stride, p.out.sample_stride, sizeof(T)) == 16};
        grid += shape.groups * ((outputs + tile_outputs - 1) / tile_outputs) * ((p.x.features + tile_features - 1) / tile_features);
      }
      if (!grid) return;
      if constexpr (!std::is_same_v<T, double>) {
        if (tensor_cores) {
          const std::size_t shared = tiles.bytes(arguments.samples);
          allow_shared(apply_tensor<T>, shared);
          return launch(apply_tensor<T>, blocks(grid), tiles.threads(), shared, stream, arguments);
        }
      }
      launch(apply_fma<T>, blocks(grid), 256, 0, stream, arguments);
    });
  }
}

}  // namespace icsd::cuda
