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
  const void* row_scale;  // one for each output, as far apart as the rows, or null
  std::int64_t matrix_group_stride;
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
    const C row = stage.row_scale ? coefficient<C>(stage.row_scale, a.wide,
                                                   group * stage.matrix_group_stride +
                                                       static_cast<std::int64_t>(output) * a.matrix_stride)
                                  : C(1);
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

// Fills rows of `width` elements, `pitch` apart, with what is `left` of `samples` samples and with zeros.
template <int kBytes, class T, class S>
__device__ void copy_block(S* to, int pitch, const T* from, std::int64_t sample_stride, int samples, int rows, int width,
                           std::int64_t left) {
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  const int copies = width / kElements;
  for (int item = threadIdx.x; item < rows * copies; item += blockDim.x) {
    const int row = item / copies, column = item % copies * kElements;
    S* const element = to + row * pitch + column;
    const T* const x = from + row * sample_stride + column;
    const std::int64_t inside = row < samples ? left - column : 0;
    if (std::is_same_v<S, T> && kBytes >= 4 && inside >= kElements) {
      if constexpr (std::is_same_v<S, T> && kBytes >= 4) __pipeline_memcpy_async(element, x, kBytes);
    } else if (kBytes == 16 && inside >= kElements) {
      const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(x);
#pragma unroll
      for (int k = 0; k < kElements; ++k) element[k] = Narrow<S>::from(widen(vector.x[k]));
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) element[k] = Narrow<S>::from(k < inside ? widen(x[k]) : 0.f);
    }
  }
}

template <class T, class S>
__device__ void copy_block(int bytes, S* to, int pitch, const T* from, std::int64_t sample_stride, int samples, int rows,
                           int width, std::int64_t left) {
  if (bytes == 16) {
    copy_block<16>(to, pitch, from, sample_stride, samples, rows, width, left);
  } else {
    copy_block<static_cast<int>(sizeof(T))>(to, pitch, from, sample_stride, samples, rows, width, left);
  }
}

// By tensor cores, from sm_80 on: each warp has 32 outputs x 32 features, a block up to 128 outputs, so that features of so
// many samples are read once. Chunks of 32 samples are multiplied while the next is on its way.
//
// The matrix is float32 whatever the features are: it is split into two numbers of the features' type or, for float16, whose
// range is too small for it, of tf32, which holds float16 exactly.
constexpr int kChunk = 32;          // samples
constexpr int kWarpTile = 32;       // outputs, and features, of a warp
constexpr int kMaxWarpRows = 4;     // of a block's outputs

template <class T>
struct Stored {  // in shared memory
  using type = float;
};
template <>
struct Stored<__nv_bfloat16> {
  using type = __nv_bfloat16;
};

// The layout of a block's shared memory.
template <class T>
struct ApplyTiles {
  using S = typename Stored<T>::type;
  static constexpr int kParts = sizeof(S) == 4 ? 1 : 2;               // tf32 is split in registers
  static constexpr int kMatrixPitch = kChunk + (sizeof(S) == 4 ? 4 : 8);
  int warp_rows, warp_columns;

  __host__ __device__ static ApplyTiles of(int outputs) {
    const int rows = (outputs + kWarpTile - 1) / kWarpTile;
    return {rows < kMaxWarpRows ? rows : kMaxWarpRows, rows == 1 ? 8 : 4};
  }
  __host__ __device__ int threads() const { return 32 * warp_rows * warp_columns; }
  __host__ __device__ int outputs() const { return warp_rows * kWarpTile; }
  __host__ __device__ int features() const { return warp_columns * kWarpTile; }
  __host__ __device__ int pitch() const { return features() + 8; }
  __host__ __device__ int matrix_part() const { return outputs() * kMatrixPitch; }
  __host__ __device__ int matrix_chunk() const { return kParts * matrix_part(); }
  __host__ __device__ int chunk() const { return matrix_chunk() + kChunk * pitch(); }  // matrix, then features
  std::size_t bytes(int samples) const {
    const std::size_t chunks = (samples > kChunk ? 2 : 1) * static_cast<std::size_t>(chunk()) * sizeof(S);
    const std::size_t results = static_cast<std::size_t>(outputs()) * pitch() * sizeof(float);
    return chunks > results ? chunks : results;
  }
};

template <class T>
__global__ void __launch_bounds__(512) apply_tensor(ApplyArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  using Tiles = ApplyTiles<T>;
  using S = typename Tiles::S;
  constexpr int kPitch = Tiles::kMatrixPitch, kStep = Operand<S>::kStep;
  ICSD_DYNAMIC_SHARED(S, shared);
  const Tiles tiles = Tiles::of(a.outputs);
  const ApplyItem<T> item(a, tiles.outputs(), tiles.features());
  const T* const x = item.stage.x + item.group * item.stage.x_group_stride + item.first_feature;
  const std::int64_t left = item.stage.features - item.first_feature;

  const auto load = [&](S* chunk, int first) {
    const int samples = min(kChunk, a.samples - first);
    copy_block(item.stage.copy_bytes, chunk + tiles.matrix_chunk(), tiles.pitch(), x + first * item.stage.x_sample_stride,
               item.stage.x_sample_stride, samples, kChunk, tiles.features(), left);
    for (int e = threadIdx.x; e < tiles.outputs() * kChunk; e += blockDim.x) {
      const int row = e / kChunk, column = e % kChunk;
      const bool inside = item.first_output + row < a.outputs && column < samples;
      const float whole = inside ? item.template element<float>(a, item.first_output + row, first + column) : 0.f;
      S* const to = chunk + row * kPitch + column;
      *to = Narrow<S>::from(whole);
      if constexpr (Tiles::kParts == 2) to[tiles.matrix_part()] = Narrow<S>::from(whole - widen(*to));
    }
  };

  const int warp = threadIdx.x / 32, row = warp / tiles.warp_columns * kWarpTile;
  const int column = warp % tiles.warp_columns * kWarpTile;
  TileSums<S, 2, 2, wmma::row_major, Tiles::kParts == 1, std::is_same_v<T, float>> product;
  S* current = shared;
  S* next = shared + tiles.chunk();
  load(current, 0);
  __pipeline_commit();
  for (int first = 0; first < a.samples; first += kChunk) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this chunk is there for all threads, and none still reads the one before
    if (first + kChunk < a.samples) load(next, first + kChunk);
    __pipeline_commit();
    const S* const features = current + tiles.matrix_chunk() + column;
    for (int k = 0; k < min(kChunk, a.samples - first); k += kStep) {
#pragma unroll
      for (int part = Tiles::kParts - 1; part >= 0; --part) {
        product.multiply(current + part * tiles.matrix_part() + row * kPitch + k, kPitch, features + k * tiles.pitch(),
                         tiles.pitch());
      }
    }
    product.add_up();
    S* const used = current;
    current = next;
    next = used;
  }
  __syncthreads();

  float* const results = reinterpret_cast<float*>(shared);
  product.store(results + row * tiles.pitch() + column, tiles.pitch(), wmma::mem_row_major);
  __syncthreads();
  constexpr int kVector = Vector<T>::kSize;
  const int vectors = tiles.features() / kVector;
  for (int e = threadIdx.x; e < tiles.outputs() * vectors; e += blockDim.x) {
    const int output = item.first_output + e / vectors, first = e % vectors * kVector;
    if (output >= a.outputs || first >= left) continue;
    const float scale = item.template scale<float>(a, output);
    const float* const from = results + e / vectors * tiles.pitch() + first;
    T* const to = item.stage.out + item.group * item.stage.out_group_stride + output * item.stage.out_sample_stride +
                  item.first_feature + first;
    Vector<T> vector;
#pragma unroll
    for (int k = 0; k < kVector; ++k) vector.x[k] = Narrow<T>::from(scale * from[k]);
    if (item.stage.whole_vectors && first + kVector <= left) {
      *reinterpret_cast<Vector<T>*>(to) = vector;
    } else {
      for (int k = 0; k < kVector && first + k < left; ++k) to[k] = vector.x[k];
    }
  }
#endif
}

}  // namespace icsd::cuda
