// Partial Gram matrices of all stages and groups. A block computes one tile of K, the products of two ranges of
// samples, over one split of the features. K is symmetric, so only tiles on or below the diagonal are computed.
// Alternatively, the launch computes all tiles of a row block: some rows of K.
#pragma once

#include "cuda/kernels/matrices.cuh"
#include "cuda/kernels/tensor_cores.cuh"
#include "cuda/operator.h"
#include "cuda/runtime/async_tiles.cuh"
#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

template <class T>
struct GramStage {
  const T* x;
  std::int64_t dim, group_stride, sample_stride;
  Compute<T>* partials;    // (groups, splits, packed_size), or row blocks or whole matrices: (groups, rows, pitch)
  std::int64_t split_dim;  // features of a split, a multiple of a line
  int splits;
  bool whole;  // the matrices are whole ones of all samples, both triangles
  unsigned first_block;
  int copy_bytes;
};

template <class T>
struct GramArguments {
  GramStage<T> stages[kMaxStages];
  int count;
  int samples, tile, tiles;         // samples; rows of a tile; tiles along K
  int first_tile, row_block_tiles;  // rows of a row block, in tiles; 0 and 0 for the whole matrix
  int pitch;                        // from row to row of a row block or whole matrix
  int buffers;                      // in the ring of input tiles
};

// The place of a block's tile.
template <class T>
struct GramPlace {
  Compute<T>* matrix;  // partial matrix, row block or whole matrix
  int row, column;     // of the matrix, at the corner of the tile
  bool whole;          // both triangles are written, from the lower one

  // Writes element (i, j) of the tile.
  __device__ void put(const GramArguments<T>& a, int i, int j, Compute<T> value) const {
    const int p = row + i, q = column + j;
    const bool lower = p < a.samples && q <= p;
    if (whole ? lower : a.row_block_tiles > 0) {
      matrix[static_cast<std::int64_t>(p) * a.pitch + q] = value;
    } else if (!whole && lower) {
      matrix[packed(p, q)] = value;
      if (p == q) matrix[packed(a.samples, q)] = value;
    }
  }

  // Writes element (i, j) of the tile to its place above the diagonal of a whole matrix.
  __device__ void put_transposed(const GramArguments<T>& a, int i, int j, Compute<T> value) const {
    const int p = row + i, q = column + j;
    if (whole && p < a.samples && q < p) matrix[static_cast<std::int64_t>(q) * a.pitch + p] = value;
  }
};

// The work of one block.
template <class T>
struct GramItem {
  AsyncTiles<T> inputs;
  std::int64_t features;  // of the split
  bool diagonal;          // both ranges are the same
  GramPlace<T> place;

  __device__ explicit GramItem(const GramArguments<T>& a) {
    int k = a.count - 1;
    while (blockIdx.x < a.stages[k].first_block) --k;
    const GramStage<T>& stage = a.stages[k];
    const bool row_block = a.row_block_tiles > 0;
    const unsigned tiles = row_block ? a.row_block_tiles * a.tiles : a.tiles * (a.tiles + 1) / 2;
    const unsigned item = blockIdx.x - stage.first_block, partial = item / tiles;
    int tile_row = 0, tile_column = static_cast<int>(item % tiles);
    if (row_block) {
      tile_row = tile_column / a.tiles;
      tile_column %= a.tiles;
    } else {
      for (; tile_column > tile_row; ++tile_row) tile_column -= tile_row + 1;
    }
    const int row = tile_row * a.tile, column = tile_column * a.tile;
    const std::int64_t group = partial / stage.splits;
    const std::int64_t begin = partial % stage.splits * stage.split_dim;
    features = min(stage.split_dim, stage.dim - begin);
    diagonal = row_block ? a.tiles == 1 : tile_row == tile_column;
    const T* const x = stage.x + group * stage.group_stride + begin;
    const int first = a.first_tile * a.tile + row;
    inputs = {x + first * stage.sample_stride,
              x + column * stage.sample_stride,
              max(0, min(a.tile, a.samples - first)),
              min(a.tile, a.samples - column),
              !diagonal,
              a.tile,
              stage.sample_stride,
              stage.copy_bytes};
    const bool whole = row_block ? diagonal : stage.whole;
    const std::int64_t rows = row_block ? static_cast<std::int64_t>(a.row_block_tiles) * a.tile : a.samples;
    const std::int64_t size = row_block || whole ? rows * a.pitch : packed_size(a.samples);
    place = {stage.partials + partial * size, row, column, whole};
  }
};

// The Gram kernel without tensor cores, for any type and device. Each thread computes kMicro x kMicro elements, 16
// apart. The sum of a line is made separately and then added, so that the error grows with the number of lines only.
constexpr int kFmaThreads = 256;

template <class T, int kMicro>
__global__ void __launch_bounds__(kFmaThreads, 1) gram_fma(GramArguments<T> a) {
  using C = Compute<T>;
  ICSD_DYNAMIC_SHARED(T, ring);
  const GramItem<T> item(a);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  C sums[kMicro][kMicro] = {};
  wait_for_previous();
  item.inputs.for_each_line(ring, a.buffers, item.features, [&](const T* rows) {
    const T* const columns = item.diagonal ? rows : rows + a.tile * kPitch<T>;
    C line[kMicro][kMicro] = {};
    for (int k = 0; k < kLine<T>; k += Vector<T>::kSize) {
      Vector<T> u[kMicro], v[kMicro];
#pragma unroll
      for (int m = 0; m < kMicro; ++m) {
        u[m] = *reinterpret_cast<const Vector<T>*>(rows + (ty + 16 * m) * kPitch<T> + k);
        v[m] = *reinterpret_cast<const Vector<T>*>(columns + (tx + 16 * m) * kPitch<T> + k);
      }
#pragma unroll
      for (int e = 0; e < Vector<T>::kSize; ++e) {
#pragma unroll
        for (int m = 0; m < kMicro; ++m) {
#pragma unroll
          for (int n = 0; n < kMicro; ++n) line[m][n] += widen(u[m].x[e]) * widen(v[n].x[e]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kMicro; ++m) {
#pragma unroll
      for (int n = 0; n < kMicro; ++n) sums[m][n] += line[m][n];
    }
  });
#pragma unroll
  for (int m = 0; m < kMicro; ++m) {
#pragma unroll
    for (int n = 0; n < kMicro; ++n) {
      item.place.put(a, ty + 16 * m, tx + 16 * n, sums[m][n]);
      item.place.put_transposed(a, ty + 16 * m, tx + 16 * n, sums[m][n]);
    }
  }
}

// The Gram kernel with tensor cores, from sm_80 on. A warp computes kTiles x kTiles tensor-core tiles; the warps of a
// block on the diagonal cover its lower triangle. Where a block has one warp's tile only, which is on the diagonal,
// kSplits warps split the features of each line.
//
// Tensor cores truncate, so their sums must be short. But they round less than the sums of these in float32, which
// grow: of 2,048 features in bfloat16 that are much alike, short sums of 256 leave half the error that those of 64 do.
template <class T>
constexpr int kShortSteps = std::is_same_v<T, float> ? 4 : 16;  // products in a short sum
template <int kTiles, int kSplits>
constexpr int kMaxTensorThreads = kSplits == 1 ? 320 : 128;

template <class T, int kTiles, int kSplits>
__global__ void __launch_bounds__(kMaxTensorThreads<kTiles, kSplits>, 1) gram_tensor(GramArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  constexpr int kWarpTile = kTiles * kTile, kStep = Operand<T>::kStep, kSteps = kLine<T> / kStep;
  constexpr int kShortLines = kShortSteps<T> * kSplits / kSteps, kSumsPitch = kWarpTile + 1;
  constexpr Split kSplit = std::is_same_v<T, float> ? Split::in_registers : Split::none;
  ICSD_DYNAMIC_SHARED(T, ring);
  __shared__ GramPlace<T> place;  // needed at the end only: there are no registers to spare
  const GramItem<T> item(a);
  if (threadIdx.x == 0) place = item.place;
  const int along = a.tile / kWarpTile, warp_tiles = item.diagonal ? along * (along + 1) / 2 : along * along;
  const int warp = threadIdx.x / 32, split = kSplits == 1 ? 0 : warp / warp_tiles;
  const bool active = warp < kSplits * warp_tiles;
  int row = 0, column = kSplits == 1 ? warp : warp % warp_tiles;
  for (const int least = item.diagonal ? 0 : along - 1; column > max(row, least); ++row) column -= max(row, least) + 1;

  const bool own = kSplits > 1 || (item.diagonal && row == column);  // a product of samples with themselves

  TileSums<T, kTiles, kTiles, Order::along_k, Order::along_k, kSplit, kSplit, kSplit != Split::none> product;
  int line = 0;
  wait_for_previous();
  item.inputs.for_each_line(ring, a.buffers, item.features, [&](const T* tile) {
    if (!active) return;
    const T* const rows = tile + row * kWarpTile * kPitch<T> + split * kStep;
    const T* const columns = tile + ((item.diagonal ? 0 : a.tile) + column * kWarpTile) * kPitch<T> + split * kStep;
    if (own) {
#pragma unroll
      for (int k = 0; k < kSteps; k += kSplits) product.multiply_own(rows + k * kStep, kPitch<T>);
    } else {
#pragma unroll
      for (int k = 0; k < kSteps; k += kSplits) {
        product.multiply(rows + k * kStep, kPitch<T>, columns + k * kStep, kPitch<T>);
      }
    }
    if (++line % kShortLines == 0) product.flush();
  });
  product.flush();
  admit_next();

  // The ring is free. The warps of a tile exchange their sums there, and each adds some of the elements.
  float* const all = reinterpret_cast<float*>(ring);
  if (active) {
    float* const to = all + warp * kWarpTile * kSumsPitch;
    if (own) {
      product.add_low_of_own(to, kSumsPitch);
    } else {
      product.add_low();
    }
    product.for_each([&](int i, int j, float sum) { to[i * kSumsPitch + j] = sum; });
  }
  __syncthreads();
  if (!active) return;
  const auto sum_of = [&](int i, int j) {
    float sum = 0;
#pragma unroll
    for (int other = 0; other < kSplits; ++other) {
      sum += all[((other * warp_tiles + warp % warp_tiles) * kWarpTile + i) * kSumsPitch + j];
    }
    return sum;
  };
  for (int e = split * 32 + threadIdx.x % 32; e < kWarpTile * kWarpTile; e += kSplits * 32) {
    const int i = e / kWarpTile, j = e % kWarpTile;
    place.put(a, row * kWarpTile + i, column * kWarpTile + j, sum_of(i, j));
  }
  if (!place.whole) return;
  for (int e = split * 32 + threadIdx.x % 32; e < kWarpTile * kWarpTile; e += kSplits * 32) {
    const int i = e % kWarpTile, j = e / kWarpTile;
    place.put_transposed(a, row * kWarpTile + i, column * kWarpTile + j, sum_of(i, j));
  }
#endif
}

}  // namespace icsd::cuda
