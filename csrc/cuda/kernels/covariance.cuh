// The loss `mse` in feature space (core/covariance.h): `compute_inverse_norms` of all samples, `covariance_tensor` or
// `covariance_fma` with one block for each split of the samples and each tile of the matrices, `sum_covariances` over
// the splits, and `finish_covariances`, which writes the loss. Where the terms of the loss cancel, it computes matrices
// and loss again from products in float64. Only the device knows where, so there are always blocks for that; they
// return at once if nothing cancels.
#pragma once

#include <type_traits>
#include <vector>

#include "core/covariance.h"
#include "cuda/kernels/compensated.cuh"
#include "cuda/kernels/matrices.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/product_tile.cuh"
#include "cuda/operator.h"
#include "cuda/runtime/async_tiles.cuh"
#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

constexpr int kSplitStep = 64;  // samples of a split are a multiple of it
constexpr int kShortSum = 256;  // samples whose products are summed in the operands' type; see LongSum for more
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

// Returns the sum of `count` numbers to every lane of the warp.
inline __device__ double warp_sum(const double* numbers, int count) {
  double sum = 0;
  for (int k = threadIdx.x % 32; k < count; k += 32) sum += numbers[k];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

using icsd::remainder_of;

// Computes what remains of sums whose errors are known, without the rounding of these large sums.
inline __device__ Remainder remainder_of(const CompensatedSum<double>& s, const CompensatedSum<double>& both,
                                         const CompensatedSum<double>& t) {
  const double errors = (s.low - both.low) + (t.low - both.low);
  const double left = ((s.high - both.high) + (t.high - both.high)) + errors;
  return {left < 0 ? 0 : left, left / (s.high + t.high)};
}

// square_of(m) is the sum of the squares of a matrix's elements. All lanes of the warp must call this.
template <class SquareOf>
__device__ Remainder remainder_of_student(const SquareOf& square_of, int student, int students) {
  return remainder_of(square_of(2 * student), square_of(2 * student + 1), square_of(2 * students));
}

// Returns square_of for what `sum_covariances` writes, (matrices, splits) of a group.
inline __device__ auto summed_squares(const double* squares) {
  return [squares](int m) { return warp_sum(squares + m * kSquareSplits, kSquareSplits); };
}

// Returns true if some student is so close to the teacher that float32 products are not accurate enough.
inline __device__ bool cancels(const double* squares, int students) {
  for (int student = 0; student < students; ++student) {
    if (remainder_of_student(summed_squares(squares), student, students).fraction < kLeastRemainder) return true;
  }
  return false;
}

// Returns the matrices of a group, in the memory of float64 numbers for all elements: all matrices in float64, or in
// float32 all matrices and then their transposes.
template <class C>
__device__ C* matrices_of(double* covariances, const CovarianceMatrices& matrices, std::int64_t group) {
  return reinterpret_cast<C*>(covariances + group * matrices.elements);
}
template <class C>
__device__ const C* matrices_of(const double* covariances, const CovarianceMatrices& matrices, std::int64_t group) {
  return reinterpret_cast<const C*>(covariances + group * matrices.elements);
}

template <class T>
struct CovarianceArguments {
  FeatureStage<T> stages[kMaxStages];
  CovarianceMatrices matrices;
  int samples, split_samples, splits;  // split_samples: of each split, a multiple of a chunk
  std::int64_t groups;
  double* inverse_norms;  // (stages, groups, samples)
  double eps;
  void* partials;     // (groups, splits, elements), of the products' type
  unsigned* tickets;  // see CovarianceFinish; or null

  __device__ double* norms(int stage, std::int64_t group) const {
    return inverse_norms + (stage * groups + group) * samples;
  }
};

// A tile of the matrices of a group, and a split of the samples.
template <class T>
struct CovarianceItem {
  int number, split;  // of the group's tiles, of the samples
  std::int64_t group;
  CovarianceMatrix matrix;
  bool symmetric;
  int row, column;  // in tiles

  __device__ CovarianceItem(const CovarianceArguments<T>& a, std::int64_t item) {
    number = static_cast<int>(item % a.matrices.tiles);
    split = static_cast<int>(item / a.matrices.tiles % a.splits);
    group = item / a.matrices.tiles / a.splits;
    int m = a.matrices.count - 1;
    while (number < a.matrices.of[m].first_tile) --m;
    matrix = a.matrices.of[m];
    symmetric = matrix.left == matrix.right;
    const int columns = (matrix.columns + kTileColumns - 1) / kTileColumns;
    row = 0;
    column = number - matrix.first_tile;
    for (; column > (symmetric ? row : columns - 1); ++row) column -= symmetric ? row + 1 : columns;
  }

  __device__ bool diagonal() const { return symmetric && row == column; }
};

// A block takes some samples: each warp two of them, then each lane of a warp one of all, since float64 roots are slow.
constexpr int kNormSamples = 16;

template <class T>
__global__ void __launch_bounds__(kRowThreads) compute_inverse_norms(CovarianceArguments<T> a, int stages) {
  __shared__ double squares[kNormSamples];
  admit_next();
  const std::int64_t all = stages * a.groups * a.samples, first = static_cast<std::int64_t>(blockIdx.x) * kNormSamples;
  for (int number = threadIdx.x / 32; number < kNormSamples && first + number < all; number += kRowThreads / 32) {
    const std::int64_t item = first + number, group = item / a.samples % a.groups;
    const FeatureStage<T>& of = a.stages[item / (a.groups * a.samples)];
    const double square = squared_norm(of.x + group * of.group_stride + item % a.samples * of.sample_stride, of.dim);
    if (threadIdx.x % 32 == 0) squares[number] = square;
  }
  __syncthreads();
  constexpr double largest = std::numeric_limits<Compute<T>>::max();
  const int number = threadIdx.x;
  if (number < kNormSamples && first + number < all) {
    a.inverse_norms[first + number] = inverse_norm(squares[number], a.eps, largest);
  }
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

// Adds the totals of the second half of a block's warps to those of the first half.
template <class Sum, int kElements>
__device__ void add_halves(Sum* shared, Sum (&totals)[kElements], int half_threads) {
  const int place = static_cast<int>(threadIdx.x) % half_threads;
  const bool second = threadIdx.x >= half_threads;
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if (second) shared[e * half_threads + place] = totals[e];
  }
  __syncthreads();
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if (!second) totals[e] += shared[e * half_threads + place];
  }
  __syncthreads();
}

// Computes one tile for one split of the samples. The right operand is divided by the norms of both samples, so that
// the left one needs no normalization.
template <class T, class Tile, class Shape>
__device__ void compute_covariance_tile(const CovarianceArguments<T>& a, const CovarianceItem<T>& item,
                                        unsigned char* shared) {
  using Tiles = CovarianceTiles<T, Shape>;
  using C = typename Tiles::C;
  constexpr int kColumns = kTileColumns, kDepth = Shape::kDepth, kChunk = Tiles::kChunk;
  constexpr int kShortSteps = kShortSum * Shape::kSplits / kDepth;
  static_assert(Shape::kRows == kColumns && Shape::kColumns == kColumns && kSplitStep % kDepth == 0);
  const CovarianceMatrix& matrix = item.matrix;
  const std::int64_t group = item.group;
  const int row = item.row, column = item.column;
  const bool diagonal = item.diagonal();
  const FeatureStage<T>&left = a.stages[matrix.left], &right = a.stages[matrix.right];
  const T* const left_x = left.x + group * left.group_stride + row * kColumns;
  const T* const right_x = right.x + group * right.group_stride + column * kColumns;
  const double *const left_norms = a.norms(matrix.left, group), *const right_norms = a.norms(matrix.right, group);

  T* const chunks = reinterpret_cast<T*>(shared);
  C* const right_operand = reinterpret_cast<C*>(shared + Tiles::kChunks);
  C* const left_copy = right_operand + kChunk;
  C* const norms = reinterpret_cast<C*>(shared + Tiles::kNorms);  // of the right samples, then of the left ones
  const int begin = item.split * a.split_samples, end = min(begin + a.split_samples, a.samples);
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
  LongSum<C> totals[Shape::kElements] = {};
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
    if ((step + 1) % kShortSteps == 0 || step + 1 == steps) tile.drain(totals);
  }
  __syncthreads();  // shared memory is free

  constexpr int kWriters = Shape::kThreads / Shape::kSplits;
  if constexpr (Shape::kSplits == 2) add_halves(reinterpret_cast<LongSum<C>*>(shared), totals, kWriters);
  C* const result = reinterpret_cast<C*>(shared);
  if (threadIdx.x < kWriters) Tile::store(result, kTilePitch, totals);
  __syncthreads();
  C* const out = static_cast<C*>(a.partials) + (group * a.splits + item.split) * a.matrices.elements + matrix.offset;
  for (int e = threadIdx.x; e < kColumns * kColumns; e += Shape::kThreads) {
    const int p = row * kColumns + e / kColumns, q = column * kColumns + e % kColumns;
    if (p < matrix.rows && q < matrix.columns) {
      out[static_cast<std::int64_t>(p) * matrix.columns + q] = result[e / kColumns * kTilePitch + e % kColumns];
    }
  }
}

// Computes the block's tile, and clears its ticket.
template <class T, class Tile, class Shape>
__device__ void covariance_of_block(const CovarianceArguments<T>& a, unsigned char* shared) {
  admit_next();
  const CovarianceItem<T> item(a, blockIdx.x);
  if (a.tickets && item.split == 0 && threadIdx.x == 0) {
    unsigned* const tickets = a.tickets + item.group * (a.matrices.tiles + 1);
    tickets[item.number] = 0;
    if (item.number == 0) tickets[a.matrices.tiles] = 0;
  }
  compute_covariance_tile<T, Tile, Shape>(a, item, shared);
}

template <class T>
__global__ void __launch_bounds__(FmaTile<Compute<T>, false>::kThreads, 1) covariance_fma(CovarianceArguments<T> a) {
  using C = Compute<T>;
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  covariance_of_block<T, AnyTile<C, false>, FmaTile<C, false>>(a, shared);
}

using CovarianceTensorShape = TensorShape<kTileColumns, 2>;

// Runs from sm_80 on.
template <class T>
__global__ void __launch_bounds__(CovarianceTensorShape::kThreads, 1) covariance_tensor(CovarianceArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  using Tile = TensorTile<CovarianceTensorShape, false, std::is_same_v<T, float>>;
  covariance_of_block<T, Tile, CovarianceTensorShape>(a, shared);
#endif
}

// Returns the sum of `x` over the threads of the block to the first of them. The order of the sum is fixed.
inline __device__ double sum_of_block(double x, double (&sums)[kRowThreads]) {
  sums[threadIdx.x] = x;
  __syncthreads();
  if (threadIdx.x >= 32) return 0;
  for (int other = threadIdx.x + 32; other < kRowThreads; other += 32) x += sums[other];
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_down_sync(0xffffffffu, x, lanes);
  return x;
}

template <class C>
struct CovarianceSums {
  CovarianceMatrices matrices;
  const C* partials;  // (groups, splits, elements)
  int splits;
  double* squares;      // (groups, matrices, splits)
  double* covariances;  // of all groups, see matrices_of
};

// Sums the partial matrices and the squares of the result. Up to 8 threads add the splits of one element.
template <class C>
__global__ void __launch_bounds__(kRowThreads) sum_covariances(CovarianceSums<C> a) {
  __shared__ double sums[kRowThreads];
  wait_for_previous();
  admit_next();
  const int square_split = static_cast<int>(blockIdx.x % kSquareSplits);
  const int m = static_cast<int>(blockIdx.x / kSquareSplits % a.matrices.count);
  const std::int64_t group = blockIdx.x / kSquareSplits / a.matrices.count;
  const CovarianceMatrix matrix = a.matrices.of[m];
  const bool symmetric = matrix.left == matrix.right;
  int threads = 1;  // that add the splits of one element
  while (threads < 8 && 2 * threads <= a.splits) threads *= 2;
  const int width = kRowThreads / threads, number = threadIdx.x / width;
  const std::int64_t all = static_cast<std::int64_t>(matrix.rows) * matrix.columns;
  const std::int64_t length = (all + kSquareSplits - 1) / kSquareSplits;
  const std::int64_t end = min(all, (square_split + 1) * length);
  const std::int64_t first = group * a.splits * a.matrices.elements + matrix.offset;
  C* const out = matrices_of<C>(a.covariances, a.matrices, group) + matrix.offset;
  double square = 0;
  for (std::int64_t base = square_split * length; base < end; base += width) {
    const std::int64_t element = base + threadIdx.x % width;
    const std::int64_t p = element / matrix.columns, q = element % matrix.columns;
    double sum = 0;
    if (element < end) {
      const bool mirrored = symmetric && q / kTileColumns > p / kTileColumns;
      const C* const from = a.partials + first + (mirrored ? q * matrix.columns + p : element);
#pragma unroll 4
      for (int split = number; split < a.splits; split += threads) sum += from[split * a.matrices.elements];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (number == 0 && element < end) {
      for (int other = 1; other < threads; ++other) sum += sums[other * width + threadIdx.x];
      out[element] = static_cast<C>(sum);
      if constexpr (std::is_same_v<C, float>) out[a.matrices.elements + q * matrix.rows + p] = static_cast<C>(sum);
      square += sum * sum;
    }
    __syncthreads();
  }
  square = sum_of_block(square, sums);
  if (threadIdx.x == 0) a.squares[blockIdx.x] = square;
}

template <class C>
struct CovarianceFinish {
  double weights[kMaxStages];  // divided by N²
  int students;
  const double* squares;  // (groups, matrices, splits)
  double* tile_squares;   // (groups, tiles, 2), compensated sums of groups that cancel
  double* covariances;    // of all groups, see matrices_of
  unsigned* tickets;      // (groups, tiles + 1): blocks that have finished a tile; tiles that are finished
  C* loss;                // (groups)
};

// A warp writes the loss of a group. square_of(m) is the sum of the squares of a matrix's elements.
template <class C, class SquareOf>
__device__ void write_loss(const CovarianceFinish<C>& a, std::int64_t group, const SquareOf& square_of) {
  double sum = 0;
  for (int student = 0; student < a.students; ++student) {
    sum += a.weights[student] * remainder_of_student(square_of, student, a.students).squares;
  }
  if (threadIdx.x % 32 == 0) a.loss[group] = static_cast<C>(sum);
}

// Returns true in the block that comes last of `count`, which sees what all of them wrote. The number of a block among
// them decides nothing else.
inline __device__ bool comes_last(unsigned* ticket, unsigned count, bool* last) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(ticket, 1u) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return *last;
}

// Sums the float64 partial matrices of a tile in the order of the splits, and the squares of the result.
template <class T, class C>
__device__ void sum_tile(const CovarianceArguments<T>& a, const CovarianceFinish<C>& finish,
                         const CovarianceItem<T>& item, double (&sums)[2][kRowThreads / 32]) {
  const CovarianceMatrix& matrix = item.matrix;
  const std::int64_t first = item.group * a.splits * a.matrices.elements + matrix.offset;
  const double* const partials = static_cast<const double*>(a.partials) + first;
  double* const out = matrices_of<double>(finish.covariances, a.matrices, item.group) + matrix.offset;
  const bool mirrored = item.symmetric && item.row != item.column;
  CompensatedSum<double> square;
  for (int e = threadIdx.x; e < kTileColumns * kTileColumns; e += kRowThreads) {
    const int p = item.row * kTileColumns + e / kTileColumns, q = item.column * kTileColumns + e % kTileColumns;
    if (p >= matrix.rows || q >= matrix.columns) continue;
    const std::int64_t element = static_cast<std::int64_t>(p) * matrix.columns + q;
    double sum = 0;
#pragma unroll 4
    for (int split = 0; split < a.splits; ++split) sum += partials[split * a.matrices.elements + element];
    out[element] = sum;
    if (mirrored) out[static_cast<std::int64_t>(q) * matrix.columns + p] = sum;
    square += __dmul_rn(mirrored ? 2 * sum : sum, sum);
  }
  square = square.of_warp();
  if (threadIdx.x % 32 == 0) {
    sums[0][threadIdx.x / 32] = square.high;
    sums[1][threadIdx.x / 32] = square.low;
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kRowThreads / 32; ++warp) square += CompensatedSum<double>{sums[0][warp], sums[1][warp]};
  double* const to = finish.tile_squares + 2 * (item.group * a.matrices.tiles + item.number);
  to[0] = square.high;
  to[1] = square.low;
}

// The first blocks write the loss of each group, unless its terms cancel. Then the others compute float64 products, one
// split of a tile each. The last block of a tile sums its splits, the last of a group's tiles writes the loss.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 1)
    finish_covariances(CovarianceArguments<T> a, CovarianceFinish<Compute<T>> finish) {
  wait_for_previous();
  const auto squares_of = [&](std::int64_t group) { return finish.squares + group * a.matrices.count * kSquareSplits; };
  constexpr bool kExact = std::is_same_v<T, double>;  // products are float64 already
  if (blockIdx.x < a.groups) {
    const double* const squares = squares_of(blockIdx.x);
    if (threadIdx.x >= 32 || (!kExact && cancels(squares, finish.students))) return;
    return write_loss(finish, blockIdx.x, summed_squares(squares));
  }
  if constexpr (!kExact) {
    using Shape = FmaTile<double, false>;
    static_assert(Shape::kThreads == kRowThreads);
    ICSD_DYNAMIC_SHARED(unsigned char, shared);
    __shared__ double sums[2][kRowThreads / 32];
    __shared__ bool last;
    const CovarianceItem<T> item(a, blockIdx.x - a.groups);
    if (!cancels(squares_of(item.group), finish.students)) return;
    compute_covariance_tile<T, AnyTile<double, false>, Shape>(a, item, shared);
    unsigned* const tickets = finish.tickets + item.group * (a.matrices.tiles + 1);
    if (!comes_last(tickets + item.number, a.splits, &last)) return;
    sum_tile(a, finish, item, sums);
    if (!comes_last(tickets + a.matrices.tiles, a.matrices.tiles, &last) || threadIdx.x >= 32) return;
    const double* const squares = finish.tile_squares + 2 * item.group * a.matrices.tiles;
    write_loss(finish, item.group, [&](int m) {
      const int end = m + 1 < a.matrices.count ? a.matrices.of[m + 1].first_tile : a.matrices.tiles;
      CompensatedSum<double> sum;
      for (int tile = a.matrices.of[m].first_tile + threadIdx.x; tile < end; tile += 32) {
        sum += CompensatedSum<double>{squares[2 * tile], squares[2 * tile + 1]};
      }
      return sum.of_warp();
    });
  }
}

}  // namespace icsd::cuda
