// Partial Gram matrices of all stages and groups: one block for each share of the features and each pair of ranges of
// samples, the second range not after the first, since K is symmetric; or some rows of the matrices alone, a band.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/matrices.cuh"
#include "cuda/operator.h"
#include "cuda/panel.cuh"
#include "cuda/tensor.cuh"

namespace icsd::cuda {

template <class T>
struct GramStage {
  const T* x;
  std::int64_t features, group_stride, sample_stride;
  Compute<T>* partials;  // (groups, splits, packed_size), or bands (groups, rows, pitch)
  std::int64_t share;    // features of a split, whole lines
  int splits;
  unsigned first_block;
  int copy_bytes;
};

template <class T>
struct GramArguments {
  GramStage<T> stages[kMaxStages];
  int count;
  int samples, side, sides;     // samples; of a range; ranges
  int first_side, band_sides;   // the ranges that are rows: of a band of the matrix, compared with all; or 0 and 0
  int pitch;                    // of a band's rows
  int depth;                    // tiles in the ring
  int ways;                     // warps that share the features of a tile of the matrix (tensor cores only)
};

// What one block computes.
template <class T>
struct GramItem {
  Panels<T> panels;
  std::int64_t begin, end;  // features
  Compute<T>* matrix;       // the partial one, or the band
  int row, column;          // of the matrix, where the block's part of it begins
  bool diagonal;            // both ranges are the same

  __device__ explicit GramItem(const GramArguments<T>& a) {
    int k = a.count - 1;
    while (blockIdx.x < a.stages[k].first_block) --k;
    const GramStage<T>& stage = a.stages[k];
    const bool band = a.band_sides > 0;
    const unsigned pairs = band ? a.band_sides * a.sides : a.sides * (a.sides + 1) / 2;
    const unsigned item = blockIdx.x - stage.first_block, whole = item / pairs;
    int side = 0, other = static_cast<int>(item % pairs);
    if (band) {
      side = other / a.sides;
      other %= a.sides;
    } else {
      for (; other > side; ++side) other -= side + 1;
    }
    row = side * a.side;
    column = other * a.side;
    const std::int64_t group = whole / stage.splits;
    begin = whole % stage.splits * stage.share;
    end = min(begin + stage.share, stage.features);
    diagonal = !band && side == other;
    const T* const x = stage.x + group * stage.group_stride;
    const int first = a.first_side * a.side + row;
    panels = {x + first * stage.sample_stride,
              x + column * stage.sample_stride,
              max(0, min(a.side, a.samples - first)),
              min(a.side, a.samples - column),
              !diagonal,
              a.side,
              stage.sample_stride,
              stage.copy_bytes};
    const std::int64_t size = band ? static_cast<std::int64_t>(a.band_sides) * a.side * a.pitch : packed_size(a.samples);
    matrix = stage.partials + whole * size;
  }

  // An element of the block's part.
  __device__ void put(const GramArguments<T>& a, int i, int j, Compute<T> value) const {
    const int p = row + i, q = column + j;
    if (a.band_sides) {
      matrix[static_cast<std::int64_t>(p) * a.pitch + q] = value;
    } else if (p < a.samples && q <= p) {
      matrix[packed(p, q)] = value;
      if (p == q) matrix[packed(a.samples, q)] = value;
    }
  }
};

// By fused multiply-adds, for any type on any device: each thread has kMicro x kMicro elements, 16 apart. A line is summed
// on its own before it is added, so that the error grows with the number of lines.
constexpr int kFmaThreads = 256;

template <class T, int kMicro>
__global__ void __launch_bounds__(kFmaThreads, 1) gram_fma(GramArguments<T> a) {
  using C = Compute<T>;
  ICSD_DYNAMIC_SHARED(T, ring);
  const GramItem<T> item(a);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  C sums[kMicro][kMicro] = {};
  item.panels.for_each_line(ring, a.depth, item.begin, item.end, [&](const T* tile) {
    const T* const columns = item.diagonal ? tile : tile + a.side * kPitch<T>;
    C line[kMicro][kMicro] = {};
    for (int k = 0; k < kLine<T>; k += Vector<T>::kSize) {
      Vector<T> u[kMicro], v[kMicro];
#pragma unroll
      for (int m = 0; m < kMicro; ++m) {
        u[m] = *reinterpret_cast<const Vector<T>*>(tile + (ty + 16 * m) * kPitch<T> + k);
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
    for (int n = 0; n < kMicro; ++n) item.put(a, ty + 16 * m, tx + 16 * n, sums[m][n]);
  }
}

// By tensor cores, from sm_80 on. Each warp has kTiles x kTiles tiles of the matrix, up to the diagonal if the block
// compares one range with itself; warps to spare take every ways-th step of the features.
template <int kTiles>
constexpr int kMaxTensorThreads = kTiles == 1 ? 128 : 320;

template <class T, int kTiles>
__global__ void __launch_bounds__(kMaxTensorThreads<kTiles>, 1) gram_tensor(GramArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  constexpr int kSide = kTiles * kTile, kStep = Operand<T>::kStep, kSteps = kLine<T> / kStep;
  constexpr bool kSplit = std::is_same_v<T, float>;
  ICSD_DYNAMIC_SHARED(T, ring);
  const GramItem<T> item(a);
  const int per_side = a.side / kSide, parts = item.diagonal ? per_side * (per_side + 1) / 2 : per_side * per_side;
  const int warp = threadIdx.x / 32, way = warp / parts;
  int row = 0, column = warp % parts;
  for (const int all = item.diagonal ? 0 : per_side - 1; column > max(row, all); ++row) column -= max(row, all) + 1;

  TileSums<T, kTiles, kTiles, wmma::col_major, kSplit, kSplit> product;
  item.panels.for_each_line(ring, a.depth, item.begin, item.end, [&](const T* tile) {
    const T* const rows = tile + row * kSide * kPitch<T>;
    const T* const columns = tile + ((item.diagonal ? 0 : a.side) + column * kSide) * kPitch<T>;
    if (way < a.ways) {
      for (int step = way; step < kSteps; step += a.ways) {
        product.multiply(rows + step * kStep, kPitch<T>, columns + step * kStep, kPitch<T>);
      }
      product.add_up();
    }
  });

  // The ring is free: the warps of a part meet there, and each adds up its share.
  float* const all = reinterpret_cast<float*>(ring);
  if (way < a.ways) product.store(all + warp * kSide * kSide, kSide);
  __syncthreads();
  if (way >= a.ways) return;
  for (int e = way * 32 + threadIdx.x % 32; e < kSide * kSide; e += a.ways * 32) {
    float sum = 0;
    for (int other = 0; other < a.ways; ++other) sum += all[(other * parts + warp % parts) * kSide * kSide + e];
    item.put(a, row * kSide + e / kSide, column * kSide + e % kSide, sum);
  }
#endif
}

}  // namespace icsd::cuda
