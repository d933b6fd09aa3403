#include "cuda/kernels/combine.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/runtime/device.cuh"
#include "cuda/kernels/launchers.h"

namespace icsd::cuda {
namespace {

// Returns how many tiles of features each block computes. More of them read the matrix less often, but all
// multiprocessors must have blocks.
int tiles_per_block(const std::vector<Product>& products, Shape shape, std::int64_t output_tiles) {
  std::int64_t tiles = 0;
  for (const Product& p : products) tiles += shape.groups * output_tiles * divide_up(p.x.dim, kTileFeatures);
  return static_cast<int>(std::clamp<std::int64_t>(tiles / (2 * multiprocessors()), 1, 64));
}

}  // namespace

void launch_combine(const std::vector<Product>& products, Shape shape, std::int64_t outputs, std::int64_t matrix_stride,
                    std::int64_t scale_stride, bool is_double, const void* group_scale, cudaStream_t stream) {
  if (!outputs) return;
  for (int code = 0; code < kDTypes; ++code) {
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      CombineArguments<T> arguments{};
      arguments.outputs = static_cast<int>(outputs);
      arguments.samples = static_cast<int>(shape.samples);
      arguments.matrix_stride = static_cast<int>(matrix_stride);
      arguments.scale_stride = static_cast<int>(scale_stride);
      arguments.is_double = is_double;
      arguments.group_scale = group_scale;
      const bool tensor_cores = !std::is_same_v<T, double> && has_tensor_cores();
      CombineTiles<T> tiles(arguments.outputs, arguments.samples, true);
      std::int64_t tile_outputs = kFmaTile, tile_features = kFmaTile;
      if (tensor_cores) {
        if constexpr (!std::is_same_v<T, double>) tiles.resident = tiles.bytes() <= dynamic_shared_limit(combine_tensor<T>);
        arguments.resident = tiles.resident;
        tile_outputs = tiles.outputs();
        arguments.tiles = tiles_per_block(products, shape, divide_up(outputs, tile_outputs));
        tile_features = arguments.tiles * kTileFeatures;
      }
      std::int64_t grid = 0;
      for (const Product& p : products) {
        if (p.x.dtype != static_cast<DType>(code)) continue;
        const int out_bytes = copy_bytes(p.out.data, p.out.group_stride, p.out.sample_stride, sizeof(T));
        arguments.stages[arguments.count++] = {static_cast<const T*>(p.x.data),
                                               static_cast<T*>(p.out.data),
                                               p.x.dim,
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
                                               out_bytes == 16};
        grid += shape.groups * divide_up(outputs, tile_outputs) * divide_up(p.x.dim, tile_features);
      }
      if (!grid) return;
      if constexpr (!std::is_same_v<T, double>) {
        if (tensor_cores) {
          allow_shared(combine_tensor<T>, tiles.bytes());
          return launch(combine_tensor<T>, blocks(grid), 32 * tiles.warps(), tiles.bytes(), stream, arguments);
        }
      }
      launch(combine_fma<T>, blocks(grid), 256, 0, stream, arguments);
    });
  }
}

}  // namespace icsd::cuda
