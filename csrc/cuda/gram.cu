#include "cuda/kernels/gram.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/runtime/device.cuh"
#include "cuda/kernels/launchers.h"

namespace icsd::cuda {
namespace {

constexpr std::size_t kRingBytes = 3 * 128 * kPitchBytes;  // of shared memory, where two tiles are not more
constexpr int kMaxDepth = 8;
constexpr int kMaxSide = 128;     // of a range of samples, for tensor cores: 10 warps up to the diagonal
constexpr int kMaxSideOfTwo = 96;  // of one of two ranges: 9 warps
constexpr int kBytesForEach = 64;  // that a split has of each sample for every sample: its partial matrix moves 1/16 of them
constexpr int kSharingWarps = 4;  // that a block has at least, if it has the whole matrix: a line has 4 steps

std::int64_t line_of(DType dtype) { return kLineBytes / static_cast<std::int64_t>(size_of(dtype)); }

// Launches the stages of one type; `two` says whether blocks may have two ranges of samples.
template <class T>
void launch_stages(GramArguments<T>& arguments, Shape shape, const GramPlan& plan, bool two, unsigned grid,
                   cudaStream_t stream) {
  arguments.samples = static_cast<int>(shape.samples);
  arguments.tile = plan.tile;
  arguments.tiles = plan.tiles;
  const std::size_t tile = static_cast<std::size_t>(two ? 2 : 1) * plan.tile * kPitchBytes;
  arguments.buffers = static_cast<int>(std::clamp<std::size_t>(kRingBytes / tile, 2, kMaxDepth));
  const std::size_t shared = arguments.buffers * tile;
  const auto run = [&](auto kernel, int threads) {
    allow_shared(kernel, shared);
    launch(kernel, grid, threads, shared, stream, arguments);
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.tensor_cores) {
      const int tiles = plan.tile == kTile ? 1 : 2, per_side = plan.tile / (tiles * kTile);
      const int parts = two ? per_side * per_side : per_side * (per_side + 1) / 2;
      arguments.warp_splits = two ? 1 : std::max(1, kSharingWarps / parts);
      return run(tiles == 1 ? gram_tensor<T, 1> : gram_tensor<T, 2>, 32 * parts * arguments.warp_splits);
    }
  }
  if constexpr (sizeof(T) > 2) {
    if (plan.tile == 64) return run(gram_fma<T, 4>, kFmaThreads);
  }
  run(gram_fma<T, 2>, kFmaThreads);
}

}  // namespace

GramPlans plan_grams(const std::vector<Features>& stages, Shape shape) {
  GramPlans plans{{}, 0};
  std::int64_t tiles = 0;  // lines of all pairs of ranges
  const bool tensor_cores = has_tensor_cores();
  for (const Features& stage : stages) {
    const std::int64_t samples = std::max<std::int64_t>(1, shape.samples);
    GramPlan plan{};
    plan.tensor_cores = tensor_cores && stage.dtype != DType::float64;
    std::int64_t side = size_of(stage.dtype) > 2 && samples > 32 ? 64 : 32;
    if (plan.tensor_cores) {
      side = samples <= kMaxSide ? samples : divide_up(samples, divide_up(samples, kMaxSideOfTwo));
      side = side <= kTile ? kTile : divide_up(side, 2 * kTile) * 2 * kTile;
    }
    plan.tile = static_cast<int>(side);
    plan.tiles = static_cast<int>(divide_up(samples, side));
    plans.stages.push_back(plan);
    tiles += shape.groups * plan.tiles * (plan.tiles + 1) / 2 * divide_up(stage.dim, line_of(stage.dtype));
  }
  // As many blocks as fill the chip twice, but none so short that its part of the partial matrix is more than a fraction of
  // what it reads.
  const std::int64_t filling = divide_up(tiles, 2 * multiprocessors());
  for (std::size_t k = 0; k < stages.size(); ++k) {
    GramPlan& plan = plans.stages[k];
    const std::int64_t line = line_of(stages[k].dtype), lines = std::max<std::int64_t>(1, divide_up(stages[k].dim, line));
    const std::int64_t worthwhile = divide_up(kBytesForEach * plan.tile, kLineBytes);
    const std::int64_t wanted = std::min(lines, std::max<std::int64_t>(filling, worthwhile));
    plan.splits = static_cast<int>(divide_up(lines, wanted));
    plan.split_dim = divide_up(lines, plan.splits) * line;
    const std::int64_t elements = shape.groups * plan.splits * packed_size(shape.samples);
    plan.offset = plans.bytes;
    plans.bytes += divide_up(elements * (stages[k].dtype == DType::float64 ? 8 : 4), 256) * 256;
  }
  return plans;
}

namespace {

// One launch for each type among the stages. `prepare(arguments, plan)` says how the matrices lie and gives the number of
// pairs of ranges; `place(k)` is where those of stage k go.
template <class Prepare, class Place>
void launch_types(const std::vector<Features>& stages, Shape shape, const GramPlans& plans, const Prepare& prepare,
                  const Place& place, cudaStream_t stream) {
  for (int code = 0; code < kDTypes; ++code) {
    with_element(static_cast<DType>(code), [&](auto element) {
      using T = decltype(element);
      GramArguments<T> arguments{};
      std::int64_t grid = 0;
      const GramPlan* plan = nullptr;  // the same for all stages of a type but for their splits
      for (std::size_t k = 0; k < stages.size(); ++k) {
        if (stages[k].dtype != static_cast<DType>(code)) continue;
        plan = &plans.stages[k];
        const Features& x = stages[k];
        arguments.stages[arguments.count++] = {static_cast<const T*>(x.data),
                                               x.dim,
                                               x.group_stride,
                                               x.sample_stride,
                                               static_cast<Compute<T>*>(place(k)),
                                               plan->split_dim,
                                               plan->splits,
                                               blocks(grid),
                                               copy_bytes(x.data, x.group_stride, x.sample_stride, sizeof(T))};
        grid += shape.groups * plan->splits * prepare(arguments, *plan);
      }
      if (plan) launch_stages(arguments, shape, *plan, plan->tiles > 1 || arguments.row_block_tiles, blocks(grid), stream);
    });
  }
}

}  // namespace

void launch_grams(const std::vector<Features>& stages, Shape shape, const GramPlans& plans, char* workspace,
                  cudaStream_t stream) {
  launch_types(
      stages, shape, plans,
      [](auto&, const GramPlan& plan) {
        return static_cast<std::int64_t>(plan.tiles) * (plan.tiles + 1) / 2;
      },
      [&](std::size_t k) -> void* { return workspace + plans.stages[k].offset; }, stream);
}

template <class C>
void launch_gram_row_block(const std::vector<Features>& stages, Shape shape, std::int64_t first, std::int64_t rows,
                 std::int64_t pitch, C* bands, cudaStream_t stream) {
  GramPlans plans = plan_grams(stages, shape);
  for (std::size_t k = 0; k < stages.size(); ++k) {
    plans.stages[k].splits = 1;
    plans.stages[k].split_dim = stages[k].dim;
  }
  launch_types(
      stages, shape, plans,
      [&](auto& arguments, const GramPlan& plan) {
        arguments.pitch = static_cast<int>(pitch);
        arguments.first_tile = static_cast<int>(first / plan.tile);
        arguments.row_block_tiles = static_cast<int>(rows / plan.tile);
        return static_cast<std::int64_t>(arguments.row_block_tiles) * plan.tiles;
      },
      [&](std::size_t k) -> void* { return bands + static_cast<std::int64_t>(k) * shape.groups * rows * pitch; }, stream);
}

template void launch_gram_row_block<float>(const std::vector<Features>&, Shape, std::int64_t, std::int64_t, std::int64_t, float*,
                                 cudaStream_t);
template void launch_gram_row_block<double>(const std::vector<Features>&, Shape, std::int64_t, std::int64_t, std::int64_t, double*,
                                  cudaStream_t);

std::vector<Partials> partials_of(const std::vector<Features>& stages, const GramPlans& plans, const char* workspace) {
  std::vector<Partials> partials;
  for (std::size_t k = 0; k < stages.size(); ++k) {
    const GramPlan& plan = plans.stages[k];
    partials.push_back({workspace + plan.offset, plan.splits, stages[k].dtype == DType::float64});
  }
  return partials;
}

}  // namespace icsd::cuda
