// `mse` in feature space (core/moments.h): `find_inverse_norms` of all samples, then `moments_tensor` or `moments_fma`, one
// block for each share of the samples and each tile of the moments, `sum_moments` of the shares and `add_up_remainders`, the
// loss. Where the terms cancel, moments and sums are made once more from products in float64; that is known on the device
// alone, so those kernels are always launched and otherwise have nothing to do.
#pragma once

#include <type_traits>

#include "core/moments.h"
#include "cuda/launch.cuh"
#include "cuda/norms.cuh"
#include "cuda/operator.h"
#include "cuda/panel.cuh"
#include "cuda/tiles.cuh"

namespace icsd::cuda {

constexpr int kMaxMoments = 2 * kMaxStages - 1;
constexpr int kParts = 64;       // blocks that share a matrix of the moments where it is added up and squared
constexpr int kShortSum = 256;   // samples whose products are summed in the operands' type before it goes on in float64
constexpr int kTilePitch = kTileColumns + 8;  // from row to row: tensor cores' loads meet all banks, either way round
constexpr int kRowThreads = 256;              // of blocks without tiles

struct MomentMatrix {
  int left, right;  // stages; of one alone, only tiles up to the diagonal are made
  int rows, columns, first_tile;
  std::int64_t offset;
};

struct MomentMatrices {
  MomentMatrix of[kMaxMoments];  // two of every student, then the teacher's
  int count, tiles;
  std::int64_t numbers;  // of a group

  __device__ int students() const { return count / 2; }
};

template <class T>
struct FeatureStage {
  const T* x;
  std::int64_t group_stride, sample_stride;
  int features, copy_bytes;
};

// The sum of squares of a matrix's elements from its parts; every lane of the warp has it.
inline __device__ double sum_of_parts(const double* parts) {
  double sum = 0;
#pragma unroll
  for (int part = 0; part < kParts; part += 32) sum += parts[part + threadIdx.x % 32];
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

// Of the squares (matrices, parts) of a group, by whole warps.
inline __device__ Remainder remainder_of_student(const double* squares, int student, int students) {
  const double* const own = squares + 2 * student * kParts;
  return remainder_of(sum_of_parts(own), sum_of_parts(own + kParts), sum_of_parts(squares + 2 * students * kParts));
}

// Whether float32 cannot tell some student from its teacher.
inline __device__ bool cancels(const double* squares, int students) {
  for (int student = 0; student < students; ++student) {
    if (remainder_of_student(squares, student, students).fraction < kLeastRemainder) return true;
  }
  return false;
}

template <class T>
struct MomentArguments {
  FeatureStage<T> stages[kMaxStages];
  MomentMatrices matrices;
  int samples, share, splits;  // samples of a split, whole chunks
  std::int64_t groups;
  double* inverse_norms;  // (stages, groups, samples)
  double eps;
  void* partials;         // (groups, splits, numbers), of the operands' type
  const double* squares;  // (groups, matrices, parts): make only those that cancel; or null

  __device__ double* norms(int stage, std::int64_t group) const { return inverse_norms + (stage * groups + group) * samples; }
};

// A warp for each sample of every stage.
template <class T>
__global__ void __launch_bounds__(kRowThreads) find_inverse_norms(MomentArguments<T> a, int stages) {
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kRowThreads / 32) + threadIdx.x / 32;
  if (item >= stages * a.groups * a.samples) return;
  const int stage = static_cast<int>(item / (a.groups * a.samples)), i = static_cast<int>(item % a.samples);
  const std::int64_t group = item / a.samples % a.groups;
  const FeatureStage<T>& of = a.stages[stage];
  const double square = squared_norm(of.x + group * of.group_stride + i * of.sample_stride, of.features);
  constexpr double largest = std::numeric_limits<Compute<T>>::max();
  if (threadIdx.x % 32 == 0) a.norms(stage, group)[i] = inverse_norm(square, a.eps, largest);
}

// A block's shared memory: two chunks of both stages' samples as they come, then as operands, and in the end the tile.
template <class T, class Shape>
struct MomentTiles {
  using C = typename Shape::C;
  static constexpr int kPanel = Shape::kDepth * kTilePitch;
  static constexpr bool kAsItComes = std::is_same_v<T, C>;  // is the left operand
  static constexpr std::size_t kRing = 4 * kPanel * sizeof(T), kOperands = (kAsItComes ? 1 : 2) * kPanel * sizeof(C);
  static constexpr std::size_t kTileBytes = Shape::kRows * kTilePitch * sizeof(C);
  static constexpr std::size_t kBytes = kRing + kOperands > kTileBytes ? kRing + kOperands : kTileBytes;
};

// What one block does. Samples are normalized on the right alone, by both norms: on the left they stay what they are.
template <class T, class Tile, class Shape>
__device__ void add_moments(const MomentArguments<T>& a, unsigned char* shared) {
  using Tiles = MomentTiles<T, Shape>;
  using C = typename Tiles::C;
  constexpr int kSide = kTileColumns, kDepth = Shape::kDepth, kPanel = Tiles::kPanel;
  static_assert(Shape::kRows == kSide && kShortSum % kDepth == 0);
  const int number = static_cast<int>(blockIdx.x % a.matrices.tiles);
  const std::int64_t whole = blockIdx.x / a.matrices.tiles, group = whole / a.splits;
  if (a.squares && !cancels(a.squares + group * a.matrices.count * kParts, a.matrices.students())) return;

  int m = a.matrices.count - 1;
  while (number < a.matrices.of[m].first_tile) --m;
  const MomentMatrix matrix = a.matrices.of[m];
  const bool symmetric = matrix.left == matrix.right;
  const int columns = (matrix.columns + kSide - 1) / kSide;
  int row = 0, column = number - matrix.first_tile;
  for (; column > (symmetric ? row : columns - 1); ++row) column -= symmetric ? row + 1 : columns;
  const bool diagonal = symmetric && row == column;
  const FeatureStage<T>&left = a.stages[matrix.left], &right = a.stages[matrix.right];
  const T* const left_x = left.x + group * left.group_stride + row * kSide;
  const T* const right_x = right.x + group * right.group_stride + column * kSide;
  const double *const left_norms = a.norms(matrix.left, group), *const right_norms = a.norms(matrix.right, group);

  T* const ring = reinterpret_cast<T*>(shared);
  C* const right_operand = reinterpret_cast<C*>(shared + Tiles::kRing);
  C* const left_copy = right_operand + kPanel;
  const int begin = static_cast<int>(whole % a.splits) * a.share, end = min(begin + a.share, a.samples);
  const int steps = (end - begin + kDepth - 1) / kDepth;
  const auto load = [&](int step) {
    const int first = begin + step * kDepth, count = min(kDepth, end - first);
    T* const to = ring + step % 2 * 2 * kPanel;
    copy_block(left.copy_bytes, to, kTilePitch, left_x + first * left.sample_stride, left.sample_stride, count, kDepth, kSide,
               matrix.rows - row * kSide);
    if (!diagonal) {
      copy_block(right.copy_bytes, to + kPanel, kTilePitch, right_x + first * right.sample_stride, right.sample_stride, count,
                 kDepth, kSide, matrix.columns - column * kSide);
    }
    __pipeline_commit();
  };

  Tile tile;
  double totals[Shape::kElements] = {};
  if (steps > 0) load(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(0);
    __syncthreads();  // this chunk is there for all threads, and none still reads the one before
    if (step + 1 < steps) load(step + 1);
    const T *const left_chunk = ring + step % 2 * 2 * kPanel, *const right_chunk = left_chunk + (diagonal ? 0 : kPanel);
    for (int e = threadIdx.x; e < kDepth * kSide; e += Shape::kThreads) {
      const int k = e / kSide, at = k * kTilePitch + e % kSide, i = begin + step * kDepth + k;
      const bool inside = i < end;
      const C right_norm = inside ? static_cast<C>(right_norms[i]) : C(0);
      const C left_norm = inside ? static_cast<C>(left_norms[i]) : C(0);
      right_operand[at] = static_cast<C>(widen(right_chunk[at])) * right_norm * left_norm;
      if constexpr (!Tiles::kAsItComes) left_copy[at] = static_cast<C>(widen(left_chunk[at]));
    }
    __syncthreads();
    if constexpr (Tiles::kAsItComes) {
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
  C* const out = static_cast<C*>(a.partials) + whole * a.matrices.numbers + matrix.offset;
  for (int e = threadIdx.x; e < kSide * kSide; e += Shape::kThreads) {
    const int p = row * kSide + e / kSide, q = column * kSide + e % kSide;
    if (p < matrix.rows && q < matrix.columns) {
      out[static_cast<std::int64_t>(p) * matrix.columns + q] = result[e / kSide * kTilePitch + e % kSide];
    }
  }
}

template <class T, class C>
__global__ void __launch_bounds__(FmaTile<C, false>::kThreads, 1) moments_fma(MomentArguments<T> a) {
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  add_moments<T, FmaTile<C, false>, FmaTile<C, false>>(a, shared);
}

using MomentTensorShape = TensorShape<kTileColumns>;

// From sm_80 on.
template <class T>
__global__ void __launch_bounds__(MomentTensorShape::kThreads, 1) moments_tensor(MomentArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  add_moments<T, TensorTile<kTileColumns, false, std::is_same_v<T, float>>, MomentTensorShape>(a, shared);
#endif
}

template <class C>
struct MomentSums {
  MomentMatrices matrices;
  const C* partials;  // (groups, splits, numbers)
  int splits;
  const double* where;  // squares that cancel, or null: everywhere
  double* squares;      // (groups, matrices, parts)
  double* out;          // (groups, numbers), or null
};

// The moments and their squares from the partial ones. The threads of a block share the splits out, too.
template <class C>
__global__ void __launch_bounds__(kRowThreads) sum_moments(MomentSums<C> a) {
  __shared__ double sums[kRowThreads];
  const int part = static_cast<int>(blockIdx.x % kParts), m = static_cast<int>(blockIdx.x / kParts % a.matrices.count);
  const std::int64_t group = blockIdx.x / kParts / a.matrices.count;
  if (a.where && !cancels(a.where + group * a.matrices.count * kParts, a.matrices.students())) return;
  const MomentMatrix matrix = a.matrices.of[m];
  const bool symmetric = matrix.left == matrix.right;
  int ways = 1;
  while (ways < 8 && 2 * ways <= a.splits) ways *= 2;
  const int width = kRowThreads / ways, way = threadIdx.x / width;
  const std::int64_t all = static_cast<std::int64_t>(matrix.rows) * matrix.columns, length = (all + kParts - 1) / kParts;
  const std::int64_t end = min(all, (part + 1) * length);
  const std::int64_t first = group * a.splits * a.matrices.numbers + matrix.offset;
  double square = 0;
  for (std::int64_t base = part * length; base < end; base += width) {
    const std::int64_t element = base + threadIdx.x % width;
    double sum = 0;
    if (element < end) {
      const std::int64_t p = element / matrix.columns, q = element % matrix.columns;
      const bool mirrored = symmetric && q / kTileColumns > p / kTileColumns;
      const C* const from = a.partials + first + (mirrored ? q * matrix.columns + p : element);
#pragma unroll 4
      for (int split = way; split < a.splits; split += ways) sum += from[split * a.matrices.numbers];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (way == 0 && element < end) {
      for (int other = 1; other < ways; ++other) sum += sums[other * width + threadIdx.x];
      if (a.out) a.out[group * a.matrices.numbers + matrix.offset + element] = sum;
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
struct RemainderArguments {
  double weights[kMaxStages];  // over N²
  int students;
  const double* squares;  // (groups, matrices, parts)
  const double* close;    // those of the groups that cancel; or null
  C* loss;                // (groups)
};

// A warp for each group.
template <class C>
__global__ void __launch_bounds__(32) add_up_remainders(RemainderArguments<C> a) {
  const std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * (2 * a.students + 1) * kParts;
  const double* const squares = (a.close && cancels(a.squares + begin, a.students) ? a.close : a.squares) + begin;
  double sum = 0;
  for (int student = 0; student < a.students; ++student) {
    sum += a.weights[student] * remainder_of_student(squares, student, a.students).squares;
  }
  if (threadIdx.x == 0) a.loss[blockIdx.x] = static_cast<C>(sum);
}

}  // namespace icsd::cuda
