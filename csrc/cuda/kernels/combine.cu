#include <algorithm>
#include <type_traits>

#include "cuda/kernels/combine.cuh"
#include "cuda/kernels/launchers.h"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

// Returns how many tiles of features each block computes. More of them read the matrix less often, but all
// multiprocessors must have blocks.
int tiles_per_block(const std::vector<Product>& products, Shape shape, std::int64_t output_tiles) {
  std::int64_t tiles = 0;
  for (const Product& p : products) tiles += shape.groups * output_tiles * divide_up(p.x.dim, kTileFeatures);
  return static_cast<int>(std::clamp<std::int64_t>(tiles / (2 * multiprocessors()), 1, 64));
}

template <class T>
CombineArguments<T> combine_arguments(Shape shape, const MatrixLayout& layout, const void* group_scale) {
  CombineArguments<T> arguments{};
  arguments.outputs = static_cast<int>(layout.outputs);
  arguments.samples = static_cast<int>(shape.samples);
  arguments.matrix_stride = static_cast<int>(layout.stride);
  arguments.scale_stride = static_cast<int>(layout.scale_stride);
  arguments.is_double = layout.is_double;
  arguments.group_scale = group_scale;
  return arguments;
}

// Adds the products of type T, whose blocks compute tiles of the given size, and returns the number of blocks.
template <class T>
std::int64_t add_products(CombineArguments<T>& arguments, const std::vector<Product>& products, Shape shape,
                          std::int64_t tile_outputs, std::int64_t tile_features) {
  std::int64_t grid = 0;
  for (const Product& p : products) {
    if (p.x.dtype != kDTypeOf<T>) continue;
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
                                           copy_bytes(p.matrix, p.matrix_group_stride, arguments.matrix_stride, 4),
                                           out_bytes == 16};
    grid += shape.groups * divide_up(arguments.outputs, tile_outputs) * divide_up(p.x.dim, tile_features);
  }
  return grid;
}

template <class T>
void launch_fma(CombineArguments<T> arguments, const std::vector<Product>& products, Shape shape, cudaStream_t stream) {
  const std::int64_t grid = add_products(arguments, products, shape, kFmaTile, kFmaTile);
  if (grid) launch_early(combine_fma<T>, blocks(grid), 256, 0, stream, arguments);
}

template <class T>
void launch_tensor(CombineArguments<T> arguments, const std::vector<Product>& products, Shape shape,
                   cudaStream_t stream) {
  CombineTiles<T> tiles(arguments.outputs, arguments.samples, true);
  tiles.resident = tiles.bytes() <= dynamic_shared_limit(combine_tensor<T>);
  arguments.resident = tiles.resident;
  arguments.tiles = tiles_per_block(products, shape, divide_up(arguments.outputs, tiles.outputs()));
  const std::int64_t grid = add_products(arguments, products, shape, tiles.outputs(), arguments.tiles * kTileFeatures);
  if (!grid) return;
  allow_shared(combine_tensor<T>, tiles.bytes());
  launch_early(combine_tensor<T>, blocks(grid), 32 * tiles.warps(), tiles.bytes(), stream, arguments);
}

}  // namespace

void launch_combine(const std::vector<Product>& products, Shape shape, const MatrixLayout& layout,
                    const void* group_scale, cudaStream_t stream) {
  if (!layout.outputs) return;
  for (int code = 0; code < kDTypes; ++code) {
    const auto has_type = [&](const Product& p) { return p.x.dtype == static_cast<DType>(code); };
    if (std::none_of(products.begin(), products.end(), has_type)) continue;
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      const auto arguments = combine_arguments<T>(shape, layout, group_scale);
      if constexpr (!std::is_same_v<T, double>) {
        if (has_tensor_cores()) return launch_tensor(arguments, products, shape, stream);
      }
      launch_fma(arguments, products, shape, stream);
    });
  }
}

}  // namespace icsd::cuda
