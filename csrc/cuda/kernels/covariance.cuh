// The loss `mse` in feature space (core/covariance.h): `compute_inverse_norms` of all samples, `covariance_tensor` or
// `covariance_fma` with one block for each split of the samples and each tile of the matrices, `sum_covariances` over
// the splits, and `feature_loss`. Where the terms of the loss cancel, matrices and sums are computed again from
// products in float64. Only the device knows where, so these kernels are always launched and return at once if nothing
// cancels.
#pragma once

#include <type_traits>
#include <vector>

#include "core/covariance.h"
#include "cuda/kernels/matrices.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/product_tile.cuh"
#include "cuda/operator.h"
#include "cuda/runtime/async_tiles.cuh"
#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

constexpr int kSplitStep = 32;  // samples of a split are a multiple of it
constexpr int kShortSum = 256;  // samples whose products are summed in the operands' type; longer sums are float64
constexpr int kTilePitch =
    kTileColumns + 8;             // from row to row, so that loads of a tile or its transpose meet all banks
constexpr int kRowThreads = 256;  // of kernels without tiles

template <class T>
struct FeatureStage {
  const T* x;
  std::int64_t group_stride, sample_stride;
  int dim, copy_bytes;
};

template <class T>
void describe_stages(const std::vector<Features>& stages, FeatureStage<T>* to) {
  for (const Features& x : stages) {
    const int bytes = copy_bytes(x.data, x.group_stride, x.sample_stride, sizeof(T));
    *to++ = {static_cast<const T*>(x.data), x.group_stride, x.sample_stride, static_cast<int>(x.dim), bytes};
  }
}

// Returns the sum of squares of a matrix's elements, from the sums of its splits, to every lane of the warp.
inline __device__ double sum_squares(const double* splits) {
  double sum = 0;
#pragma unroll
  for (int split = 0; split < kSquareSplits; split += 32) sum += splits[split + threadIdx.x % 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

// `squares` are those of a group, (matrices, splits). All lanes of the warp must call this.
inline __device__ Remainder remainder_of_student(const double* squares, int student, int students) {
  const double* const own = squares + 2 * student * kSquareSplits;
  return remainder_of(sum_squares(own), sum_squares(own + kSquareSplits),
                      sum_squares(squares + 2 * students * kSquareSplits));
}

// Returns true if some student is so close to the teacher that float32 products are not accurate enough.
inline __device__ bool cancels(const double* squares, int students) {
  for (int student = 0; student < students; ++student) {
    if (remainder_of_student(squares, student, students).fraction < kLeastRemainder) return true;
  }
  return false;
}

template <class T>
struct CovarianceArguments {
  FeatureStage<T> stages[kMaxStages];
  CovarianceMatrices matrices;
  int samples, split_samples, splits;  // split_samples: of each split, a multiple of a chunk
  std::int64_t groups;
  double* inverse_norms;  // (stages, groups, samples)
  double eps;
  void* partials;         // (groups, splits, elements), of the operands' type
  const double* squares;  // (groups, matrices, splits) to compute only groups that cancel, or null

  __device__ double* norms(int stage, std::int64_t group) const {
    return inverse_norms + (stage * groups + group) * samples;
  }
};

// Each warp takes one sample of a stage.
template <class T>
__global__ void __launch_bounds__(kRowThreads) compute_inverse_norms(CovarianceArguments<T> a, int stages) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (item >= stages * a.groups * a.samples) return;
  const int stage = static_cast<int>(item / (a.groups * a.samples)), i = static_cast<int>(item % a.samples);
  const std::int64_t group = item / a.samples % a.groups;
  const FeatureStage<T>& of = a.stages[stage];
  const double square = squared_norm(of.x + group * of.group_stride + i * of.sample_stride, of.dim);
  constexpr double largest = std::numeric_limits<Compute<T>>::max();
  if (threadIdx.x % 32 == 0) a.norms(stage, group)[i] = inverse_norm(square, a.eps, largest);
}

// The layout of a block's shared memory: two chunks of both stages' samples, then the operands made from one of them.
// At the end, the tile of the result replaces all of them. After them, the inverse norms of two chunks' samples.
template <class T, class Shape>
struct CovarianceTiles {
  using C = typename Shape::C;
  static constexpr int kChunk = Shape::kDepth * kTilePitch;
  static constexpr bool kLeftInPlace = std::is_same_v<T, C>;  // the left operand is the chunk itself
  static constexpr std::size_t kChunks = 4 * kChunk * sizeof(T);
  static constexpr std::size_t kOperands = (kLeftInPlace ? 1 : 2) * kChunk * sizeof(C);
  static constexpr std::size_t kTileBytes = Shape::kRows * kTilePitch * sizeof(C);
  static constexpr std::size_t kNorms = kChunks + kOperands > kTileBytes ? kChunks + kOperands : kTileBytes;
  static constexpr std::size_t kBytes = kNorms + 4 * Shape::kDepth * sizeof(C);
};

// Computes one tile for one split of the samples. The right operand is divided by the norms of both samples, so that
// the left one needs no normalization.
template <class T, class Tile, class Shape>
__device__ void compute_covariance_tile(const CovarianceArguments<T>& a, unsigned char* shared) {
  using Tiles = CovarianceTiles<T, Shape>;
  using C = typename Tiles::C;
  constexpr int kColumns = kTileColumns, kDepth = Shape::kDepth, kChunk = Tiles::kChunk;
  static_assert(Shape::kRows == kColumns && kShortSum % kDepth == 0 && kSplitStep % kDepth == 0);
  const int number = static_cast<int>(blockIdx.x % a.matrices.tiles);
  const std::int64_t partial = blockIdx.x / a.matrices.tiles, group = partial / a.splits;
  if (a.squares && !cancels(a.squares + group * a.matrices.count * kSquareSplits, a.matrices.students())) return;

  int m = a.matrices.count - 1;
  while (number < a.matrices.of[m].first_tile) --m;
  const CovarianceMatrix matrix = a.matrices.of[m];
  const bool symmetric = matrix.left == matrix.right;
  const int columns = (matrix.columns + kColumns - 1) / kColumns;
  int row = 0, column = number - matrix.first_tile;
  for (; column > (symmetric ? row : columns - 1); ++row) column -= symmetric ? row + 1 : columns;
  const bool diagonal = symmetric && row == column;
  const FeatureStage<T>&left = a.stages[matrix.left], &right = a.stages[matrix.right];
  const T* const left_x = left.x + group * left.group_stride + row * kColumns;
  const T* const right_x = right.x + group * right.group_stride + column * kColumns;
  const double *const left_norms = a.norms(matrix.left, group), *const right_norms = a.norms(matrix.right, group);

  T* const chunks = reinterpret_cast<T*>(shared);
  C* const right_operand = reinterpret_cast<C*>(shared + Tiles::kChunks);
  C* const left_copy = right_operand + kChunk;
  C* const norms = reinterpret_cast<C*>(shared + Tiles::kNorms);  // of the right samples, then of the left ones
  const int begin = static_cast<int>(partial % a.splits) * a.split_samples,
            end = min(begin + a.split_samples, a.samples);
  const int steps = (end - begin + kDepth - 1) / kDepth;
  const auto load = [&](int step) {
    const int first = begin + step * kDepth, count = min(kDepth, end - first);
    T* const to = chunks + step % 2 * 2 * kChunk;
    copy_rectangle(left.copy_bytes, to, kTilePitch, left_x + first * left.sample_stride, left.sample_stride, count,
                   kDepth, kColumns, matrix.rows - row * kColumns);
    if (!diagonal) {
      copy_rectangle(right.copy_bytes, to + kChunk, kTilePitch, right_x + first * right.sample_stride,
                     right.sample_stride, count, kDepth, kColumns, matrix.columns - column * kColumns);
    }
    __pipeline_commit();
    if (threadIdx.x < kDepth) {
      const int k = threadIdx.x;
      norms[step % 2 * 2 * kDepth + k] = k < count ? static_cast<C>(right_norms[first + k]) : C(0);
      norms[(step % 2 * 2 + 1) * kDepth + k] = k < count ? static_cast<C>(left_norms[first + k]) : C(0);
    }
  };

  Tile tile;
  double totals[Shape::kElements] = {};
  if (steps > 0) load(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(0);
    __syncthreads();  // all threads see this chunk, and none still reads the previous one
    if (step + 1 < steps) load(step + 1);
    const T* const left_chunk = chunks + step % 2 * 2 * kChunk;
    const T* const right_chunk = left_chunk + (diagonal ? 0 : kChunk);
    const C* const right_norm = norms + step % 2 * 2 * kDepth;
    const C* const left_norm = right_norm + kDepth;
    for (int e = threadIdx.x; e < kDepth * kColumns; e += Shape::kThreads) {
      const int k = e / kColumns, at = k * kTilePitch + e % kColumns;
      right_operand[at] = static_cast<C>(widen(right_chunk[at])) * right_norm[k] * left_norm[k];
      if constexpr (!Tiles::kLeftInPlace) left_copy[at] = static_cast<C>(widen(left_chunk[at]));
    }
    __syncthreads();
    if constexpr (Tiles::kLeftInPlace) {
      tile.multiply(left_chunk, kTilePitch, right_operand, kTilePitch);
    } else {
      tile.multiply(left_copy, kTilePitch, right_operand, kTilePitch);
    }
    if ((step + 1) % (kShortSum / kDepth) == 0 || step + 1 == steps) tile.drain(totals);
  }
  __syncthreads();  // shared memory is free

  C* const result = reinterpret_cast<C*>(shared);
  Tile::store(result, kTilePitch, totals);
  __syncthreads();
  C* const out = static_cast<C*>(a.partials) + partial * a.matrices.elements + matrix.offset;
  for (int e = threadIdx.x; e < kColumns * kColumns; e += Shape::kThreads) {
    const int p = row * kColumns + e / kColumns, q = column * kColumns + e % kColumns;
    if (p < matrix.rows && q < matrix.columns) {
      out[static_cast<std::int64_t>(p) * matrix.columns + q] = result[e / kColumns * kTilePitch + e % kColumns];
    }
  }
}

template <class T, class C>
__global__ void __launch_bounds__(FmaTile<C, false>::kThreads, 1) covariance_fma(CovarianceArguments<T> a) {
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  compute_covariance_tile<T, AnyTile<C, false>, FmaTile<C, false>>(a, shared);
}

using CovarianceTensorShape = TensorShape<kTileColumns>;

// Runs from sm_80 on.
template <class T>
__global__ void __launch_bounds__(CovarianceTensorShape::kThreads, 1) covariance_tensor(CovarianceArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  compute_covariance_tile<T, TensorTile<kTileColumns, false, std::is_same_v<T, float>>, CovarianceTensorShape>(a,
                                                                                                               shared);
#endif
}

template <class C>
struct CovarianceSums {
  CovarianceMatrices matrices;
  const C* partials;  // (groups, splits, elements)
  int splits;
  const double* close;  // squares to sum only groups that cancel, or null
  double* squares;      // (groups, matrices, splits)
  double* out;          // (groups, elements), or null
};

// Sums the partial matrices and the squares of the result. Up to 8 threads add the splits of one element.
template <class C>
__global__ void __launch_bounds__(kRowThreads) sum_covariances(CovarianceSums<C> a) {
  __shared__ double sums[kRowThreads];
  wait_for_previous();
  const int square_split = static_cast<int>(blockIdx.x % kSquareSplits);
  const int m = static_cast<int>(blockIdx.x / kSquareSplits % a.matrices.count);
  const std::int64_t group = blockIdx.x / kSquareSplits / a.matrices.count;
  if (a.close && !cancels(a.close + group * a.matrices.count * kSquareSplits, a.matrices.students())) return;
  const CovarianceMatrix matrix = a.matrices.of[m];
  const bool symmetric = matrix.left == matrix.right;
  int threads = 1;  // that add the splits of one element
  while (threads < 8 && 2 * threads <= a.splits) threads *= 2;
  const int width = kRowThreads / threads, number = threadIdx.x / width;
  const std::int64_t all = static_cast<std::int64_t>(matrix.rows) * matrix.columns;
  const std::int64_t length = (all + kSquareSplits - 1) / kSquareSplits;
  const std::int64_t end = min(all, (square_split + 1) * length);
  const std::int64_t first = group * a.splits * a.matrices.elements + matrix.offset;
  double square = 0;
  for (std::int64_t base = square_split * length; base < end; base += width) {
    const std::int64_t element = base + threadIdx.x % width;
    double sum = 0;
    if (element < end) {
      const std::int64_t p = element / matrix.columns, q = element % matrix.columns;
      const bool mirrored = symmetric && q / kTileColumns > p / kTileColumns;
      const C* const from = a.partials + first + (mirrored ? q * matrix.columns + p : element);
#pragma unroll 4
      for (int split = number; split < a.splits; split += threads) sum += from[split * a.matrices.elements];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (number == 0 && element < end) {
      for (int other = 1; other < threads; ++other) sum += sums[other * width + threadIdx.x];
      if (a.out) a.out[group * a.matrices.elements + matrix.offset + element] = sum;
      square += sum * sum;
    }
    __syncthreads();
  }
  sums[threadIdx.x] = square;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  for (int other = threadIdx.x + 32; other < kRowThreads; other += 32) square += sums[other];
  for (int lanes = 16; lanes > 0; lanes /= 2) square += __shfl_down_sync(0xffffffffu, square, lanes);
  if (threadIdx.x == 0) a.squares[blockIdx.x] = square;
}

template <class C>
struct FeatureLossArguments {
  double weights[kMaxStages];  // divided by N²
  int students;
  const double* squares;  // (groups, matrices, splits)
  const double* close;    // the more accurate squares of groups that cancel, or null
  C* loss;                // (groups)
};

// A warp computes the loss of a group.
template <class C>
__global__ void __launch_bounds__(32) feature_loss(FeatureLossArguments<C> a) {
  wait_for_previous();
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * (2 * a.students + 1) * kSquareSplits;
  const double* const squares = (a.close && cancels(a.squares + begin, a.students) ? a.close : a.squares) + begin;
  double sum = 0;
  for (int student = 0; student < a.students; ++student) {
    sum += a.weights[student] * remainder_of_student(squares, student, a.students).squares;
  }
  if (threadIdx.x == 0) a.loss[blockIdx.x] = static_cast<C>(sum);
}

}  // namespace icsd::cuda
