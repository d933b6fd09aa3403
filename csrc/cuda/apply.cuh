// Products of small matrices with features, out = diag(row scale) matrix X, group by group: the gradients from [A | r].
#pragma once

#include "cuda/launch.cuh"
#include "cuda/operator.h"
#include "cuda/panel.cuh"
#include "cuda/tensor.cuh"

namespace icsd::cuda {

template <class T>
struct ApplyStage {
  const T* x;
  T* out;
  std::int64_t features, x_group_stride, x_sample_stride, out_group_stride, out_sample_stride;
  const void* matrix;     // (groups, outputs, samples)
  const void* row_scale;  // one for each output, or null
  std::int64_t matrix_group_stride, scale_group_stride;
  unsigned first_block;
  int copy_bytes;      // of x
  bool whole_vectors;  // every sample of out begins on a multiple of 16 bytes
};

template <class T>
struct ApplyArguments {
  ApplyStage<T> stages[kMaxStages];
  int count;
  int outputs, samples;
  int matrix_stride;        // from row to row
  int scale_stride;         // from scale to scale
  int run;                  // tiles of features of a block (tensor cores only)
  bool resident;            // the matrix stays in shared memory (tensor cores only)
  bool wide;                // matrices and scales are float64, else float32
  const void* group_scale;  // one for each group, or null
};

template <class C>
__device__ C coefficient(const void* data, bool wide, std::int64_t index) {
  return wide ? static_cast<C>(static_cast<const double*>(data)[index]) : static_cast<C>(static_cast<const float*>(data)[index]);
}

// What one block computes: columns [first_feature, ...) of the outputs [first_output, ...) of a group.
template <class T>
struct ApplyItem {
  const ApplyStage<T>& stage;
  std::int64_t group, first_feature;
  int first_output;

  __device__ ApplyItem(const ApplyArguments<T>& a, int tile_outputs, int tile_features)
      : stage(stage_of_block(a)) {
    const std::int64_t tiles = (stage.features + tile_features - 1) / tile_features;
    const int bands = (a.outputs + tile_outputs - 1) / tile_outputs;
    const std::int64_t item = blockIdx.x - stage.first_block, whole = item / tiles;
    first_feature = item % tiles * tile_features;
    first_output = static_cast<int>(whole % bands) * tile_outputs;
    group = whole / bands;
  }

  static __device__ const ApplyStage<T>& stage_of_block(const ApplyArguments<T>& a) {
    int k = a.count - 1;
    while (blockIdx.x < a.stages[k].first_block) --k;
    return a.stages[k];
  }

  template <class C>
  __device__ C element(const ApplyArguments<T>& a, int output, int sample) const {
    return coefficient<C>(stage.matrix, a.wide,
                          group * stage.matrix_group_stride + static_cast<std::int64_t>(output) * a.matrix_stride + sample);
  }
  template <class C>
  __device__ C scale(const ApplyArguments<T>& a, int output) const {
    const std::int64_t index = group * stage.scale_group_stride + static_cast<std::int64_t>(output) * a.scale_stride;
    const C row = stage.row_scale ? coefficient<C>(stage.row_scale, a.wide, index) : C(1);
    return a.group_scale ? row * coefficient<C>(a.group_scale, a.wide, group) : row;
  }
};

// By fused multiply-adds, for any type on any device: tiles of 64 outputs and 64 features, each thread 4 x 4, 16 apart.
constexpr int kFmaTile = 64, kFmaSamples = 32;

template <class T>
__global__ void __launch_bounds__(256) apply_fma(ApplyArguments<T> a) {
  using C = Compute<T>;
  __shared__ C matrix[kFmaTile][kFmaSamples + 1];
  __shared__ C x[kFmaSamples][kFmaTile];
  const ApplyItem<T> item(a, kFmaTile, kFmaTile);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const T* const features = item.stage.x + item.group * item.stage.x_group_stride + item.first_feature;
  const std::int64_t left = item.stage.features - item.first_feature;
  C sums[4][4] = {};
  for (int first = 0; first < a.samples; first += kFmaSamples) {
    for (int e = threadIdx.x; e < kFmaTile * kFmaSamples; e += blockDim.x) {
      const int row = e / kFmaSamples, column = e % kFmaSamples;
      const bool inside = item.first_output + row < a.outputs && first + column < a.samples;
      matrix[row][column] = inside ? item.template element<C>(a, item.first_output + row, first + column) : C(0);
    }
    for (int e = threadIdx.x; e < kFmaSamples * kFmaTile; e += blockDim.x) {
      const int row = e / kFmaTile, column = e % kFmaTile;
      const bool inside = first + row < a.samples && column < left;
      x[row][column] = inside ? widen(features[(first + row) * item.stage.x_sample_stride + column]) : C(0);
    }
    __syncthreads();
    C part[4][4] = {};
#pragma unroll 8
    for (int k = 0; k < kFmaSamples; ++k) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) part[m][n] += matrix[ty + 16 * m][k] * x[k][tx + 16 * n];
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sums[m][n] += part[m][n];
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int output = item.first_output + ty + 16 * m;
    if (output >= a.outputs) continue;
    const C scale = item.template scale<C>(a, output);
    T* const out = item.stage.out + item.group * item.stage.out_group_stride + output * item.stage.out_sample_stride;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = tx + 16 * n;
      if (column < left) out[item.first_feature + column] = Narrow<T>::from(scale * sums[m][n]);
    }
  }
}

// By tensor cores, from sm_80 on: each warp has 32 outputs x 32 features, a block up to 128 outputs, so that features of so
// many samples are read once. A block goes through several tiles of 128 features, a chunk of 32 samples after the other,
// each multiplied while the next is on its way; the matrix stays in shared memory if it fits.
//
// The matrix is float32 whatever the features are: it is split into two numbers of the features' type or, for float16, whose
// range is too small for it, of tf32, which holds float16 exactly.
constexpr int kChunk = 32;         // samples
constexpr int kWarpTile = 32;      // outputs, and features, of a warp
constexpr int kMaxWarpRows = 4;    // of a block's outputs
constexpr int kWarpColumns = 4;    // of its features
constexpr int kTileFeatures = kWarpColumns * kWarpTile;
constexpr int kResultPitch = kTile + 4;

template <class T>
struct Stored {  // in shared memory
  using type = float;
};
template <>
struct Stored<__nv_bfloat16> {
  using type = __nv_bfloat16;
};

// A block's shared memory: chunks of the matrix, chunks of features, a tile of results for each warp.
template <class T>
struct ApplyTiles {
  using S = typename Stored<T>::type;
  static constexpr int kParts = sizeof(S) == 4 ? 1 : 2;  // of the matrix; tf32 is split in registers
  static constexpr int kMatrixPitch = kChunk + (sizeof(S) == 4 ? 4 : 8), kPitch = kTileFeatures + 8;
  int warp_rows, chunks;
  bool resident;  // all chunks of the matrix are there, else two

  __host__ __device__ ApplyTiles(int outputs, int samples, bool resident)
      : warp_rows((outputs + kWarpTile - 1) / kWarpTile), chunks((samples + kChunk - 1) / kChunk), resident(resident) {
    if (warp_rows > kMaxWarpRows) warp_rows = kMaxWarpRows;
    if (chunks == 0) chunks = 1;
  }
  __host__ __device__ int warps() const { return warp_rows * kWarpColumns; }
  __host__ __device__ int outputs() const { return warp_rows * kWarpTile; }
  __host__ __device__ int matrix_part() const { return outputs() * kMatrixPitch; }
  __host__ __device__ int matrix() const { return (resident ? chunks : 2) * kParts * matrix_part(); }
  std::size_t bytes() const {
    return (matrix() + 2 * kChunk * kPitch) * sizeof(S) + warps() * kTile * kResultPitch * sizeof(float);
  }
};

template <class T>
__global__ void __launch_bounds__(32 * kMaxWarpRows * kWarpColumns) apply_tensor(ApplyArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  using Tiles = ApplyTiles<T>;
  using S = typename Tiles::S;
  constexpr int kPitch = Tiles::kPitch, kMatrixPitch = Tiles::kMatrixPitch, kParts = Tiles::kParts;
  constexpr int kStep = Operand<S>::kStep, kVector = Vector<T>::kSize;
  ICSD_DYNAMIC_SHARED(S, matrix);
  const Tiles tiles(a.outputs, a.samples, a.resident);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / kWarpColumns * kWarpTile, column = warp % kWarpColumns * kWarpTile;
  S* const ring = matrix + tiles.matrix();
  float* const results = reinterpret_cast<float*>(ring + 2 * kChunk * kPitch) + warp * kTile * kResultPitch;
  const ApplyItem<T> item(a, tiles.outputs(), a.run * kTileFeatures);
  const T* const x = item.stage.x + item.group * item.stage.x_group_stride + item.first_feature;
  const std::int64_t left = item.stage.features - item.first_feature;
  const int steps = static_cast<int>(min((left + kTileFeatures - 1) / kTileFeatures, static_cast<std::int64_t>(a.run))) *
                    tiles.chunks;

  const auto load_matrix = [&](S* to, int first) {
    for (int e = threadIdx.x; e < tiles.outputs() * kChunk; e += blockDim.x) {
      const int output = item.first_output + e / kChunk, sample = first + e % kChunk;
      const bool inside = output < a.outputs && sample < a.samples;
      const float whole = inside ? item.template element<float>(a, output, sample) : 0.f;
      S* const element = to + e / kChunk * kMatrixPitch + e % kChunk;
      *element = Narrow<S>::from(whole);
      if constexpr (kParts == 2) element[tiles.matrix_part()] = Narrow<S>::from(whole - widen(*element));
    }
  };
  const auto load = [&](int step) {
    const int chunk = step % tiles.chunks, first = chunk * kChunk;
    const std::int64_t feature = static_cast<std::int64_t>(step / tiles.chunks) * kTileFeatures;
    copy_block(item.stage.copy_bytes, ring + step % 2 * kChunk * kPitch, kPitch,
               x + first * item.stage.x_sample_stride + feature, item.stage.x_sample_stride, min(kChunk, a.samples - first),
               kChunk, kTileFeatures, left - feature);
    if (!tiles.resident) load_matrix(matrix + step % 2 * kParts * tiles.matrix_part(), first);
    __pipeline_commit();
  };
  // The warp's results, tile by tile by way of shared memory, in whole vectors.
  const auto store = [&](const auto& product, std::int64_t feature) {
    product.for_each_tile([&](int m, int n, const auto& tile) {
      wmma::store_matrix_sync(results, tile, kResultPitch, wmma::mem_row_major);
      __syncwarp();
      for (int e = lane; e < kTile * kTile / kVector; e += 32) {
        const int i = e / (kTile / kVector), output = item.first_output + row + m * kTile + i;
        const std::int64_t first = feature + column + n * kTile + e % (kTile / kVector) * kVector;
        if (output >= a.outputs || first >= left) continue;
        const float scale = item.template scale<float>(a, output);
        const float* const from = results + i * kResultPitch + e % (kTile / kVector) * kVector;
        T* const to = item.stage.out + item.group * item.stage.out_group_stride + output * item.stage.out_sample_stride +
                      item.first_feature + first;
        Vector<T> vector;
#pragma unroll
        for (int k = 0; k < kVector; ++k) vector.x[k] = Narrow<T>::from(scale * from[k]);
        if (item.stage.whole_vectors && first + kVector <= left) {
          *reinterpret_cast<Vector<T>*>(to) = vector;
        } else {
          for (int k = 0; k < kVector; ++k) {
            if (first + k < left) to[k] = vector.x[k];
          }
        }
      }
      __syncwarp();
    });
  };

  if (tiles.resident) {
    for (int chunk = 0; chunk < tiles.chunks; ++chunk) load_matrix(matrix + chunk * kParts * tiles.matrix_part(), chunk * kChunk);
  }
  load(0);
  TileSums<S, 2, 2, wmma::row_major, kParts == 1, std::is_same_v<T, float>> product;
  for (int step = 0; step < steps; ++step) {
    const int chunk = step % tiles.chunks;
    __pipeline_wait_prior(0);
    __syncthreads();  // this chunk is there for all threads, and none still reads the one before
    if (step + 1 < steps) load(step + 1);
    const S* const rows = matrix + (tiles.resident ? chunk : step % 2) * kParts * tiles.matrix_part() + row * kMatrixPitch;
    const S* const features = ring + step % 2 * kChunk * kPitch + column;
    for (int k = 0; k < min(kChunk, a.samples - chunk * kChunk); k += kStep) {
#pragma unroll
      for (int part = kParts - 1; part >= 0; --part) {
        product.multiply(rows + part * tiles.matrix_part() + k, kMatrixPitch, features + k * kPitch, kPitch);
      }
    }
    product.add_up();
    if (chunk == tiles.chunks - 1) {
      store(product, static_cast<std::int64_t>(step / tiles.chunks) * kTileFeatures);
      product.clear();
    }
  }
#endif
}

}  // namespace icsd::cuda
