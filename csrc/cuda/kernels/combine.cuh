// Products of matrices with the samples of a group, out = diag(row scale) matrix X. They make the gradients from [A |
// r].
#pragma once

#include "cuda/kernels/tensor_cores.cuh"
#include "cuda/operator.h"
#include "cuda/runtime/async_tiles.cuh"
#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

template <class T>
struct CombineStage {
  const T* x;
  T* out;
  std::int64_t dim, x_group_stride, x_sample_stride, out_group_stride, out_sample_stride;
  const void* matrix;     // (groups, outputs, samples)
  const void* row_scale;  // one number per output, or null
  std::int64_t matrix_group_stride, scale_group_stride;
  unsigned first_block;
  int copy_bytes;      // of x
  int matrix_bytes;    // that one copy of the matrix may move
  bool whole_vectors;  // every sample of out begins at a multiple of 16 bytes
};

template <class T>
struct CombineArguments {
  CombineStage<T> stages[kMaxStages];
  int count;
  int outputs, samples;     // rows and columns of the matrix
  int matrix_stride;        // from row to row
  int scale_stride;         // from scale to scale
  int tiles;                // tiles of features that a block computes (tensor cores only)
  bool resident;            // the matrix stays in shared memory (tensor cores only)
  bool is_double;           // matrices and scales are float64, else float32
  const void* group_scale;  // one number per group, or null
};

template <class C>
__device__ C coefficient(const void* data, bool is_double, std::int64_t index) {
  return is_double ? static_cast<C>(static_cast<const double*>(data)[index])
                   : static_cast<C>(static_cast<const float*>(data)[index]);
}

// The work of one block: columns [first_feature, ...) of the outputs [first_output, ...) of a group.
template <class T>
struct CombineItem {
  const CombineStage<T>& stage;
  std::int64_t group, first_feature;
  int first_output;

  __device__ CombineItem(const CombineArguments<T>& a, int tile_outputs, int tile_features) : stage(stage_of_block(a)) {
    const std::int64_t tiles = (stage.dim + tile_features - 1) / tile_features;
    const int output_tiles = (a.outputs + tile_outputs - 1) / tile_outputs;
    const std::int64_t item = blockIdx.x - stage.first_block, rest = item / tiles;
    first_feature = item % tiles * tile_features;
    first_output = static_cast<int>(rest % output_tiles) * tile_outputs;
    group = rest / output_tiles;
  }

  static __device__ const CombineStage<T>& stage_of_block(const CombineArguments<T>& a) {
    int k = a.count - 1;
    while (blockIdx.x < a.stages[k].first_block) --k;
    return a.stages[k];
  }

  // Returns where a row of the matrix begins.
  __device__ std::int64_t row(const CombineArguments<T>& a, int output) const {
    return group * stage.matrix_group_stride +
           static_cast<std::int64_t>(static_cast<unsigned>(output)) * a.matrix_stride;
  }
  template <class C>
  __device__ C element(const CombineArguments<T>& a, int output, int sample) const {
    return coefficient<C>(stage.matrix, a.is_double, row(a, output) + sample);
  }
  template <class C>
  __device__ C scale(const CombineArguments<T>& a, int output) const {
    const std::int64_t index = group * stage.scale_group_stride + static_cast<std::int64_t>(output) * a.scale_stride;
    const C row = stage.row_scale ? coefficient<C>(stage.row_scale, a.is_double, index) : C(1);
    return a.group_scale ? row * coefficient<C>(a.group_scale, a.is_double, group) : row;
  }
};

// The kernel without tensor cores, for any type and device. A block computes 64 outputs x 64 features; each thread 4 x
// 4 of them, 16 apart.
constexpr int kFmaTile = 64, kFmaSamples = 32;

template <class T>
__global__ void __launch_bounds__(256) combine_fma(CombineArguments<T> a) {
  using C = Compute<T>;
  __shared__ C matrix[kFmaTile][kFmaSamples + 1];
  __shared__ C x[kFmaSamples][kFmaTile];
  const CombineItem<T> item(a, kFmaTile, kFmaTile);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const T* const features = item.stage.x + item.group * item.stage.x_group_stride + item.first_feature;
  const std::int64_t left = item.stage.dim - item.first_feature;
  C sums[4][4] = {};
  wait_for_previous();
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
    C chunk[4][4] = {};
#pragma unroll 8
    for (int k = 0; k < kFmaSamples; ++k) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) chunk[m][n] += matrix[ty + 16 * m][k] * x[k][tx + 16 * n];
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sums[m][n] += chunk[m][n];
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

// The kernel with tensor cores, from sm_80 on. A warp computes 32 outputs x 32 features, a block up to 128 outputs, so
// that features of up to 128 samples are read once. A block computes several tiles of 128 features, from chunks of 32
// samples: one is multiplied while the next is copied. The matrix stays in shared memory if it fits.
//
// The matrix is float32 for every type of features. bfloat16 features multiply it as two bfloat16 terms, which are made
// in shared memory from a copy of it. The range of float16 is too small for that; float16 features are converted to
// tf32, which represents them exactly.
constexpr int kChunk = 32;       // samples
constexpr int kWarpTile = 32;    // outputs and features of a warp
constexpr int kMaxWarpRows = 4;  // warps along a block's outputs
constexpr int kWarpColumns = 4;  // warps along its features
constexpr int kTileFeatures = kWarpColumns * kWarpTile;
constexpr int kRun = 8;  // neighboring features that a lane stores of an output

template <class T>
struct Stored {  // the type of an operand in shared memory
  using type = float;
};
template <>
struct Stored<__nv_bfloat16> {
  using type = __nv_bfloat16;
};

// The layout of a block's shared memory: chunks of the matrix, two chunks of features. If a matrix of two terms is not
// resident, one chunk of these and two of float32 elements.
template <class T>
struct CombineTiles {
  using S = typename Stored<T>::type;
  static constexpr int kTerms = sizeof(S) == 4 ? 1 : 2;  // whose sum is the matrix; tf32 is split in registers
  static constexpr int kMatrixPitch = kChunk + (sizeof(S) == 4 ? 4 : 8), kPitch = kTileFeatures + 8;
  static constexpr int kWholePitch = kChunk + 4;  // of float32 elements
  int warp_rows, chunks;
  bool resident;  // all chunks of the matrix are in shared memory, else those of two steps

  __host__ __device__ CombineTiles(int outputs, int samples, bool resident)
      : warp_rows((outputs + kWarpTile - 1) / kWarpTile), chunks((samples + kChunk - 1) / kChunk), resident(resident) {
    if (warp_rows > kMaxWarpRows) warp_rows = kMaxWarpRows;
    if (chunks == 0) chunks = 1;
  }
  __host__ __device__ int warps() const { return warp_rows * kWarpColumns; }
  __host__ __device__ int outputs() const { return warp_rows * kWarpTile; }
  __host__ __device__ int matrix_term() const { return outputs() * kMatrixPitch; }
  __host__ __device__ int whole() const { return outputs() * kWholePitch; }
  __host__ __device__ int matrix() const {
    if (!resident && kTerms == 2) return kTerms * matrix_term() + 2 * whole() * static_cast<int>(4 / sizeof(S));
    return (resident ? chunks : 2) * kTerms * matrix_term();
  }
  std::size_t bytes() const {
    const std::int64_t elements = resident ? std::int64_t{chunks} * kTerms * matrix_term() : matrix();  // more than int
    return (elements + 2 * kChunk * kPitch) * sizeof(S);
  }
};

#if __CUDA_ARCH__ >= 800

// Lane t of four lanes gives words[n] and gets word t of lane n in its place.
__device__ inline void transpose_words(unsigned (&words)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      if (n & bit) continue;
      const unsigned other = __shfl_xor_sync(0xffffffffu, upper ? words[n] : words[n + bit], bit);
      (upper ? words[n] : words[n + bit]) = other;
    }
  }
}

__device__ inline unsigned pack(__nv_bfloat16, float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ inline unsigned pack(__half, float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// Gets the lane's features of one of its outputs, times `scale`. All lanes of the warp must call this.
template <class Product, class T, int kWords>
__device__ void take_run(const Product& product, int m, int half, float scale, T type, unsigned (&words)[kWords]) {
  const auto& sums = product.sums[m];
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) words[k] = __float_as_uint(scale * sums[k % 4][2 * half + k / 4]);
  } else if constexpr (Product::B::kWide) {
#pragma unroll
    for (int k = 0; k < kRun; k += 2) {
      const int place = 2 * half + k / 4;
      words[k / 2] = pack(type, scale * sums[k % 4][place], scale * sums[k % 4 + 1][place]);
    }
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) words[n] = pack(type, scale * sums[n][2 * half], scale * sums[n][2 * half + 1]);
    transpose_words(words);
  }
}

#endif

template <class T>
__global__ void __launch_bounds__(32 * kMaxWarpRows * kWarpColumns) combine_tensor(CombineArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  using Tiles = CombineTiles<T>;
  using S = typename Tiles::S;
  constexpr int kPitch = Tiles::kPitch, kMatrixPitch = Tiles::kMatrixPitch, kTerms = Tiles::kTerms;
  constexpr int kStep = Operand<S>::kStep, kVector = Vector<T>::kSize;
  ICSD_DYNAMIC_SHARED(S, matrix);
  const Tiles tiles(a.outputs, a.samples, a.resident);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / kWarpColumns * kWarpTile, column = warp % kWarpColumns * kWarpTile;
  S* const chunks = matrix + tiles.matrix();
  const CombineItem<T> item(a, tiles.outputs(), a.tiles * kTileFeatures);
  const T* const x = item.stage.x + item.group * item.stage.x_group_stride + item.first_feature;
  const std::int64_t left = item.stage.dim - item.first_feature;
  const std::int64_t feature_tiles =
      min((left + kTileFeatures - 1) / kTileFeatures, static_cast<std::int64_t>(a.tiles));
  const int steps = static_cast<int>(feature_tiles) * tiles.chunks;

  const auto convert = [&](S* to, int e, float value) {
    S* const element = to + e / kChunk * kMatrixPitch + e % kChunk;
    *element = Narrow<S>::from(value);
    if constexpr (kTerms == 2) element[tiles.matrix_term()] = Narrow<S>::from(value - widen(*element));
  };
  const auto coefficient_of = [&](int first, int e) {
    const int output = item.first_output + e / kChunk, sample = first + e % kChunk;
    return output < a.outputs && sample < a.samples ? item.template element<float>(a, output, sample) : 0.f;
  };
  // Copies a chunk of a float32 matrix asynchronously.
  const auto copy_matrix = [&](float* to, int pitch, int first) {
    const float* const from = static_cast<const float*>(item.stage.matrix) + item.row(a, item.first_output) + first;
    copy_rectangle(item.stage.matrix_bytes, to, pitch, from, a.matrix_stride, a.outputs - item.first_output,
                   tiles.outputs(), kChunk, a.samples - first);
  };
  const auto load_elements = [&](S* to, int first) {
    for (int e = threadIdx.x; e < tiles.outputs() * kChunk; e += blockDim.x) convert(to, e, coefficient_of(first, e));
  };
  // Loads a chunk of the matrix, asynchronously if nothing is converted.
  const auto load_matrix = [&](S* to, int first) {
    if constexpr (kTerms == 1) {
      if (!a.is_double) return copy_matrix(to, kMatrixPitch, first);
    }
    load_elements(to, first);
  };
  const auto chunk_of_matrix = [&](int chunk) {  // where it is in shared memory
    if (!tiles.resident) chunk = kTerms == 1 ? chunk % 2 : 0;
    return matrix + chunk * kTerms * tiles.matrix_term();
  };
  const auto whole_chunk = [&](int step) {  // where the float32 elements of two terms are
    return reinterpret_cast<float*>(matrix + kTerms * tiles.matrix_term()) + step % 2 * tiles.whole();
  };
  // Makes two terms of a chunk of the matrix.
  const auto make_terms = [&](int step) {
    if (a.is_double) return load_elements(matrix, step % tiles.chunks * kChunk);
    const float* const whole = whole_chunk(step);
    for (int item = threadIdx.x; item < tiles.outputs() * kChunk / 4; item += blockDim.x) {
      const int output = item / (kChunk / 4), sample = item % (kChunk / 4) * 4;
      const auto x = *reinterpret_cast<const Vector<float>*>(whole + output * Tiles::kWholePitch + sample);
      HalfVector<S> high, low;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        high.x[k] = Narrow<S>::from(x.x[k]);
        low.x[k] = Narrow<S>::from(x.x[k] - widen(high.x[k]));
      }
      S* const to = matrix + output * kMatrixPitch + sample;
      *reinterpret_cast<HalfVector<S>*>(to) = high;
      *reinterpret_cast<HalfVector<S>*>(to + tiles.matrix_term()) = low;
    }
  };
  const auto load = [&](int step) {
    const int chunk = step % tiles.chunks, first = chunk * kChunk;
    const std::int64_t feature = static_cast<std::int64_t>(step / tiles.chunks) * kTileFeatures;
    copy_rectangle(item.stage.copy_bytes, chunks + step % 2 * kChunk * kPitch, kPitch,
                   x + first * item.stage.x_sample_stride + feature, item.stage.x_sample_stride,
                   min(kChunk, a.samples - first), kChunk, kTileFeatures, left - feature);
    if (!tiles.resident) {
      if constexpr (kTerms == 1) {
        load_matrix(chunk_of_matrix(step), first);
      } else if (!a.is_double) {
        copy_matrix(whole_chunk(step), Tiles::kWholePitch, first);
      }
    }
    __pipeline_commit();
  };
  const auto store = [&](const auto& product, std::int64_t feature) {
    const std::int64_t first = feature + column + lane % 4 * kRun;
#pragma unroll
    for (int number = 0; number < 4; ++number) {
      const int m = number / 2, half = number % 2, output = item.first_output + row + product.row(m, 2 * half);
      unsigned words[kRun * sizeof(T) / 4];
      take_run(product, m, half, output < a.outputs ? item.template scale<float>(a, output) : 0.f, T{}, words);
      if (output >= a.outputs) continue;
      T* const to = item.stage.out + item.group * item.stage.out_group_stride + output * item.stage.out_sample_stride +
                    item.first_feature + first;
      if (item.stage.whole_vectors && first + kRun <= left) {
#pragma unroll
        for (int k = 0; k < kRun / kVector; ++k) {
          // The compiler would split a plain store.
          __stwb(reinterpret_cast<uint4*>(to) + k,
                 make_uint4(words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]));
        }
      } else {
#pragma unroll
        for (int k = 0; k < kRun; ++k) {
          if (first + k < left) to[k] = reinterpret_cast<const T*>(words)[k];
        }
      }
    }
  };

  wait_for_previous();
  if (tiles.resident) {
    for (int chunk = 0; chunk < tiles.chunks; ++chunk) load_matrix(chunk_of_matrix(chunk), chunk * kChunk);
  }
  load(0);
  constexpr Split kSplitMatrix = kTerms == 1 ? Split::in_registers : Split::in_memory;
  constexpr Split kSplitFeatures = std::is_same_v<T, float> ? Split::in_registers : Split::none;
  TileSums<S, 2, 2, Order::along_k, Order::across_k, kSplitMatrix, kSplitFeatures> product;
  for (int step = 0; step < steps; ++step) {
    const int chunk = step % tiles.chunks;
    __pipeline_wait_prior(0);
    __syncthreads();  // all threads see this chunk, and none still reads the previous one
    if (step + 1 < steps) load(step + 1);
    if constexpr (kTerms == 2) {
      if (!tiles.resident) {
        make_terms(step);
        __syncthreads();
      }
    }
    const S* const terms = chunk_of_matrix(tiles.resident ? chunk : step);
    const S* rows = terms + row * kMatrixPitch;
    const S* features = chunks + step % 2 * kChunk * kPitch + column;
    for (int rest = min(kChunk, a.samples - chunk * kChunk); rest > 0; rest -= kStep) {
      product.multiply(rows, kMatrixPitch, features, kPitch, tiles.matrix_term());
      rows += kStep;
      features += kStep * kPitch;
    }
    product.flush();
    if (chunk == tiles.chunks - 1) {
      store(product, static_cast<std::int64_t>(step / tiles.chunks) * kTileFeatures);
      product.clear();
    }
  }
#endif
}

}  // namespace icsd::cuda
