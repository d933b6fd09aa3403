#include <algorithm>
#include <type_traits>

#include "cuda/kernels/gram.cuh"
#include "cuda/kernels/launchers.h"
#include "cuda/runtime/device.cuh"

namespace icsd::cuda {
namespace {

constexpr std::size_t kRingBytes = 3 * 128 * kPitchBytes;  // of shared memory, unless two input tiles are more
constexpr int kMaxBuffers = 8;
constexpr int kMaxTile = 128;       // rows, if one tile is the matrix: 10 warps up to the diagonal
constexpr int kMaxTileOfMany = 96;  // rows, if there are several tiles: 9 warps
// Bytes of each sample that a split has at least for each row of the tile. Its partial matrix moves 1/16 of them.
constexpr int kSplitBytes = 64;
constexpr int kLineSteps = 4;  // of products along a line, shared by as many warps where one warp has a whole tile

std::int64_t line_of(DType dtype) { return kLineBytes / static_cast<std::int64_t>(size_of(dtype)); }

std::int64_t lines_of(const Features& stage) {
  return std::max<std::int64_t>(1, divide_up(stage.dim, line_of(stage.dtype)));
}

GramPlan plan_tiles(DType dtype, std::int64_t samples, bool tensor_cores) {
  GramPlan plan{};
  plan.tensor_cores = tensor_cores && dtype != DType::float64;
  std::int64_t tile = size_of(dtype) > 2 && samples > 32 ? 64 : 32;
  if (plan.tensor_cores) {
    tile = samples <= kMaxTile ? samples : divide_up(samples, divide_up(samples, kMaxTileOfMany));
    tile = tile <= kTile ? kTile : divide_up(tile, 2 * kTile) * 2 * kTile;
  }
  plan.tile = static_cast<int>(tile);
  plan.tiles = static_cast<int>(divide_up(samples, tile));
  return plan;
}

// A kernel and the blocks that it runs in.
template <class T>
struct GramLaunch {
  void (*kernel)(GramArguments<T>);
  int threads, buffers;
  std::size_t shared;
};

// Returns the launch for a plan. Blocks compare two ranges of samples if there are several tiles.
template <class T>
GramLaunch<T> gram_launch(const GramPlan& plan) {
  const bool two = plan.tiles > 1;
  const std::size_t buffer = static_cast<std::size_t>(two ? 2 : 1) * plan.tile * kPitchBytes;
  const std::size_t buffers = std::clamp<std::size_t>(kRingBytes / buffer, 2, kMaxBuffers);
  const auto with = [&](auto kernel, int threads) -> GramLaunch<T> {
    return {kernel, threads, static_cast<int>(buffers), buffers * buffer};
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.tensor_cores) {
      const int warp_tile = plan.tile == kTile ? 1 : 2, along = plan.tile / (warp_tile * kTile);
      const int warp_tiles = two ? along * along : along * (along + 1) / 2;
      if (warp_tile == 1) return with(gram_tensor<T, 1, kLineSteps>, 32 * kLineSteps);
      if (warp_tiles == 1) return with(gram_tensor<T, 2, kLineSteps>, 32 * kLineSteps);
      return with(gram_tensor<T, 2, 1>, 32 * warp_tiles);
    }
  }
  if constexpr (sizeof(T) > 2) {
    if (plan.tile == 64) return with(gram_fma<T, 4>, kFmaThreads);
  }
  return with(gram_fma<T, 2>, kFmaThreads);
}

// Returns how many blocks the device holds at once.
std::int64_t resident_blocks(DType dtype, const GramPlan& plan) {
  int of_multiprocessor = 0;
  with_element(dtype, [&](auto element) {
    const auto of = gram_launch<decltype(element)>(plan);
    of_multiprocessor = resident_blocks(of.kernel, of.threads, of.shared);
  });
  return std::max(1, of_multiprocessor) * static_cast<std::int64_t>(multiprocessors());
}

// Launches the stages of one type.
template <class T>
void launch_stages(GramArguments<T>& arguments, Shape shape, const GramPlan& plan, unsigned grid, bool early,
                   cudaStream_t stream) {
  const GramLaunch<T> of = gram_launch<T>(plan);
  arguments.samples = static_cast<int>(shape.samples);
  arguments.tile = plan.tile;
  arguments.tiles = plan.tiles;
  arguments.buffers = of.buffers;
  allow_shared(of.kernel, of.shared);
  if (early) return launch_early(of.kernel, grid, of.threads, of.shared, stream, arguments);
  launch(of.kernel, grid, of.threads, of.shared, stream, arguments);
}

// Makes one launch for each type among the stages. `prepare(arguments, plan)` sets the layout of the matrices and
// returns the number of tiles of each; `matrix_of(k)` is where the matrices of stage k go. All launches but the first
// of a call are early.
template <class Prepare, class Matrix>
void launch_types(const std::vector<Features>& stages, Shape shape, const GramPlans& plans, const Prepare& prepare,
                  const Matrix& matrix_of, bool first, cudaStream_t stream) {
  for (int code = 0; code < kDTypes; ++code) {
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      GramArguments<T> arguments{};
      std::int64_t grid = 0;
      const GramPlan* plan = nullptr;  // stages of a type differ in their splits only
      for (std::size_t k = 0; k < stages.size(); ++k) {
        if (stages[k].dtype != kDTypeOf<T>) continue;
        plan = &plans.stages[k];
        const Features& x = stages[k];
        arguments.stages[arguments.count++] = {static_cast<const T*>(x.data),
                                               x.dim,
                                               x.group_stride,
                                               x.sample_stride,
                                               static_cast<Compute<T>*>(matrix_of(k)),
                                               plan->split_dim,
                                               plan->splits,
                                               plan->whole,
                                               blocks(grid),
                                               copy_bytes(x.data, x.group_stride, x.sample_stride, sizeof(T))};
        grid += shape.groups * plan->splits * prepare(arguments, *plan);
      }
      if (!plan) return;
      launch_stages(arguments, shape, *plan, blocks(grid), !first, stream);
      first = false;
    });
  }
}

}  // namespace

GramPlans plan_grams(const std::vector<Features>& stages, Shape shape, bool is_double) {
  GramPlans plans{{}, 0};
  const std::int64_t samples = std::max<std::int64_t>(1, shape.samples);
  const bool tensor_cores = has_tensor_cores();
  std::int64_t lines = 0;  // of all tiles
  for (const Features& stage : stages) {
    const GramPlan plan = plan_tiles(stage.dtype, samples, tensor_cores);
    plans.stages.push_back(plan);
    lines += shape.groups * plan.tiles * (plan.tiles + 1) / 2 * divide_up(stage.dim, line_of(stage.dtype));
  }
  // There are as many blocks as the device holds at once, so that as many bytes as possible are in flight. But none is
  // so short that writing its partial matrix takes more than a fraction of the time that reading takes.
  for (std::size_t k = 0; k < stages.size(); ++k) {
    GramPlan& plan = plans.stages[k];
    const std::int64_t filling = divide_up(lines, resident_blocks(stages[k].dtype, plan));
    const std::int64_t all = lines_of(stages[k]), worthwhile = divide_up(kSplitBytes * plan.tile, kLineBytes);
    plan.splits = static_cast<int>(divide_up(all, std::min(all, std::max(filling, worthwhile))));
    plan.split_dim = divide_up(all, plan.splits) * line_of(stages[k].dtype);
    const bool double_stage = stages[k].dtype == DType::float64;
    plan.whole = plan.splits == 1 && plan.tiles > 1 && double_stage == is_double;
    plan.offset = plans.bytes;
    const std::int64_t elements = plan.whole ? 0 : shape.groups * plan.splits * packed_size(shape.samples);
    plans.bytes += divide_up(elements * (double_stage ? 8 : 4), 256) * 256;
  }
  return plans;
}

template <class C>
void launch_grams(const std::vector<Features>& stages, Shape shape, const GramPlans& plans, void* workspace,
                  C* matrices, std::int64_t pitch, bool first, cudaStream_t stream) {
  const auto prepare = [&](auto& arguments, const GramPlan& plan) {
    arguments.pitch = static_cast<int>(pitch);
    return static_cast<std::int64_t>(plan.tiles) * (plan.tiles + 1) / 2;
  };
  const std::int64_t size = shape.groups * shape.samples * pitch;
  const auto matrix_of = [&](std::size_t k) -> void* {
    if (plans.stages[k].whole) return matrices + static_cast<std::int64_t>(k) * size;
    return static_cast<char*>(workspace) + plans.stages[k].offset;
  };
  launch_types(stages, shape, plans, prepare, matrix_of, first, stream);
}

template void launch_grams<float>(const std::vector<Features>&, Shape, const GramPlans&, void*, float*, std::int64_t,
                                  bool, cudaStream_t);
template void launch_grams<double>(const std::vector<Features>&, Shape, const GramPlans&, void*, double*, std::int64_t,
                                   bool, cudaStream_t);

template <class C>
void launch_gram_row_block(const std::vector<Features>& stages, Shape shape, const RowBlock& block, C* out,
                           cudaStream_t stream) {
  GramPlans plans = plan_grams(stages, shape, sizeof(C) == sizeof(double));
  for (std::size_t k = 0; k < stages.size(); ++k) {
    plans.stages[k].splits = 1;
    plans.stages[k].split_dim = stages[k].dim;
  }
  const auto prepare = [&](auto& arguments, const GramPlan& plan) {
    arguments.pitch = static_cast<int>(block.pitch);
    arguments.first_tile = static_cast<int>(block.first / plan.tile);
    arguments.row_block_tiles = static_cast<int>(block.rows / plan.tile);
    return static_cast<std::int64_t>(arguments.row_block_tiles) * plan.tiles;
  };
  const std::int64_t size = shape.groups * block.rows * block.pitch;
  const auto matrix_of = [&](std::size_t k) -> void* { return out + static_cast<std::int64_t>(k) * size; };
  launch_types(stages, shape, plans, prepare, matrix_of, false, stream);
}

template void launch_gram_row_block<float>(const std::vector<Features>&, Shape, const RowBlock&, float*, cudaStream_t);
template void launch_gram_row_block<double>(const std::vector<Features>&, Shape, const RowBlock&, double*,
                                            cudaStream_t);

std::vector<Partials> partials_of(const std::vector<Features>& stages, const GramPlans& plans, const void* workspace) {
  std::vector<Partials> partials;
  for (std::size_t k = 0; k < stages.size(); ++k) {
    const GramPlan& plan = plans.stages[k];
    const char* const data = static_cast<const char*>(workspace) + plan.offset;
    partials.push_back({plan.whole ? nullptr : data, plan.splits, stages[k].dtype == DType::float64});
  }
  return partials;
}

}  // namespace icsd::cuda
