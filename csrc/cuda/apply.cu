#include "cuda/apply.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/launchers.h"

namespace icsd::cuda {
namespace {

// Tiles of features for each block: the more, the less often is the matrix read, but all multiprocessors must have blocks.
int run_of(const std::vector<Product>& products, Shape shape, std::int64_t bands) {
  std::int64_t tiles = 0;
  for (const Product& p : products) tiles += shape.groups * bands * divide_up(p.x.features, kTileFeatures);
  return static_cast<int>(std::clamp<std::int64_t>(tiles / (2 * multiprocessors()), 1, 64));
}

}  // namespace

void launch_apply(const std::vector<Product>& products, Shape shape, std::int64_t outputs, std::int64_t matrix_stride,
                  std::int64_t scale_stride, bool wide, const void* group_scale, cudaStream_t stream) {
  if (!outputs) return;
  for (int code = 0; code < kDTypes; ++code) {
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      ApplyArguments<T> arguments{};
      arguments.outputs = static_cast<int>(outputs);
      arguments.samples = static_cast<int>(shape.samples);
      arguments.matrix_stride = static_cast<int>(matrix_stride);
      arguments.scale_stride = static_cast<int>(scale_stride);
      arguments.wide = wide;
      arguments.group_scale = group_scale;
      const bool tensor_cores = !std::is_same_v<T, double> && has_tensor_cores();
      ApplyTiles<T> tiles(arguments.outputs, arguments.samples, true);
      std::int64_t tile_outputs = kFmaTile, tile_features = kFmaTile;
      if (tensor_cores) {
        tiles.resident = tiles.bytes() <= static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
        arguments.resident = tiles.resident;
        tile_outputs = tiles.outputs();
        arguments.run = run_of(products, shape, divide_up(outputs, tile_outputs));
        tile_features = arguments.run * kTileFeatures;
      }
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
                                               p.scale_group_stride,
                                               blocks(grid),
                                               copy_bytes(p.x.data, p.x.group_stride, p.x.sample_stride, sizeof(T)),
                                               copy_bytes(p.out.data, p.out.group_stride, p.out.sample_stride, sizeof(T)) == 16};
        grid += shape.groups * divide_up(outputs, tile_outputs) * divide_up(p.x.features, tile_features);
      }
      if (!grid) return;
      if constexpr (!std::is_same_v<T, double>) {
        if (tensor_cores) {
          allow_shared(apply_tensor<T>, tiles.bytes());
          return launch(apply_tensor<T>, blocks(grid), 32 * tiles.warps(), tiles.bytes(), stream, arguments);
        }
      }
      launch(apply_fma<T>, blocks(grid), 256, 0, stream, arguments);
    });
  }
}

}  // namespace icsd::cuda
