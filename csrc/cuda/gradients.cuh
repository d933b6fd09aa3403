// Gradients of `mse` in feature space, dL/dX̂ = 4w/N² (X̂ (X̂ᵀX̂) - Ŷ (ŶᵀX̂)) and from it dL/dX: each block takes some samples
// of a stage through all of its features, keeps dL/dX̂ where none but it reads, and writes dL/dX once.
#pragma once

#include "cuda/moments.cuh"

namespace icsd::cuda {

template <class T>
struct GradientArguments {
  FeatureStage<T> stages[kMaxStages];
  struct Out {
    T* x;
    std::int64_t group_stride, sample_stride;
  } outs[kMaxStages];
  int targets[kMaxStages], target_count;  // stages whose gradients are wanted
  MomentMatrices matrices;
  double factors[kMaxStages];  // 4w / N² of the students
  int students, samples;
  std::int64_t items;  // targets, groups, ranges of samples
  std::int64_t groups;
  const double* moments;        // (groups, numbers)
  const Compute<T>* group_scale;
  double eps;
  const double* squares;  // (groups, matrices, parts): float32 takes groups that do not cancel, float64 the others; or null
  unsigned char* scratch;
  std::int64_t scratch_bytes;  // of a block
};

// A part of the gradient with respect to a stage: the samples of `source` times a matrix.
struct GradientTerm {
  int source;
  const double* matrix;
  std::int64_t stride, column_stride;  // from row to row, from column to column
  double factor;
};

template <class T>
__device__ GradientTerm gradient_term(const GradientArguments<T>& a, const double* moments, int target, int number) {
  const int teacher = a.students, student = target == teacher ? number : target;
  if (student == teacher) {  // the last of the teacher's
    double factor = 0;
    for (int k = 0; k < a.students; ++k) factor += a.factors[k];
    const MomentMatrix& own = a.matrices.of[2 * teacher];
    return {teacher, moments + own.offset, own.columns, 1, factor};
  }
  const MomentMatrix &own = a.matrices.of[2 * student], &both = a.matrices.of[2 * student + 1];
  if (target == teacher) return {student, moments + both.offset, both.columns, 1, -a.factors[student]};
  if (number == 0) return {student, moments + own.offset, own.columns, 1, a.factors[student]};
  return {teacher, moments + both.offset, 1, both.columns, -a.factors[student]};
}

// A block's shared memory: two chunks of samples, one of them as operand if they are of another type, two of the matrix; or a
// tile of dL/dX̂. After them what each sample's gradient has along the sample.
template <class T, class Shape>
struct GradientTiles {
  using C = typename Shape::C;
  static constexpr bool kAsItComes = std::is_same_v<T, C>;
  static constexpr int kPitch = Shape::kDepth + 16 / sizeof(T), kOperandPitch = Shape::kDepth + 16 / sizeof(C);
  static constexpr int kChunk = Shape::kRows * kPitch, kOperand = kAsItComes ? 0 : Shape::kRows * kOperandPitch;
  static constexpr int kMatrix = Shape::kDepth * kTilePitch;
  static constexpr std::size_t kChunks = 2 * kChunk * sizeof(T) + (kOperand + 2 * kMatrix) * sizeof(C);
  static constexpr std::size_t kTile = Shape::kRows * kTilePitch * sizeof(C);
  static constexpr std::size_t kAlong = kChunks > kTile ? kChunks : kTile;
  static constexpr std::size_t kBytes = kAlong + Shape::kRows * sizeof(C);

  // Of a block's scratch: inverse norms of all stages' samples, then dL/dX̂.
  static std::size_t scratch(std::int64_t stages, std::int64_t features) {
    return (stages * Shape::kRows * sizeof(double) + Shape::kRows * features * sizeof(C) + 255) / 256 * 256;
  }
};

template <class T, class Tile, class Shape>
__device__ void differentiate_samples(const GradientArguments<T>& a, unsigned char* shared) {
  using Tiles = GradientTiles<T, Shape>;
  using C = typename Tiles::C;
  constexpr int kRows = Shape::kRows, kDepth = Shape::kDepth, kWarps = Shape::kThreads / 32;
  constexpr int kPitch = Tiles::kPitch, kOperandPitch = Tiles::kOperandPitch;
  T* const ring = reinterpret_cast<T*>(shared);
  C* const operand = reinterpret_cast<C*>(shared + 2 * Tiles::kChunk * sizeof(T));
  C* const matrices = operand + Tiles::kOperand;
  C* const tile_of_v = reinterpret_cast<C*>(shared);
  C* const along = reinterpret_cast<C*>(shared + Tiles::kAlong);
  double* const inverse_norms = reinterpret_cast<double*>(a.scratch + blockIdx.x * a.scratch_bytes);
  C* const v = reinterpret_cast<C*>(inverse_norms + (a.students + 1) * kRows);  // dL/dX̂
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ranges = (a.samples + kRows - 1) / kRows;

#pragma unroll 1
  for (std::int64_t item = blockIdx.x; item < a.items; item += gridDim.x) {
    const std::int64_t group = item / ranges % a.groups;
    const int first = static_cast<int>(item % ranges) * kRows, target = a.targets[item / ranges / a.groups];
    const int samples = min(kRows, a.samples - first), terms = target == a.students ? a.students + 1 : 2;
    if (a.squares && cancels(a.squares + group * a.matrices.count * kParts, a.students) != std::is_same_v<C, double>) continue;
    const double* const moments = a.moments + group * a.matrices.numbers;
    const auto samples_of = [&](int stage) {
      const FeatureStage<T>& of = a.stages[stage];
      return of.x + group * of.group_stride + first * of.sample_stride;
    };
    const FeatureStage<T>& own = a.stages[target];

    for (int number = 0; number < terms; ++number) {
      const int source = gradient_term(a, moments, target, number).source;
      for (int row = warp; row < kRows; row += kWarps) {
        const bool inside = row < samples;
        const double square = inside ? squared_norm(samples_of(source) + row * a.stages[source].sample_stride,
                                                    a.stages[source].features)
                                     : 0;
        constexpr double largest = std::numeric_limits<Compute<T>>::max();
        if (lane == 0) inverse_norms[source * kRows + row] = inverse_norm(square, a.eps, largest);
      }
    }
    for (int row = threadIdx.x; row < kRows; row += Shape::kThreads) along[row] = 0;
    __syncthreads();

    for (int first_feature = 0; first_feature < own.features; first_feature += kTileColumns) {
      // A chunk of a term's features.
      struct Chunk {
        int number, feature;
      };
      // Of the matrix, through registers: on their way while the chunk before is multiplied.
      constexpr int kCoefficients = kDepth * kTileColumns / Shape::kThreads;
      double coefficients[kCoefficients];
      const auto place = [&](const GradientTerm& term, int n, int& k, int& j) {
        const int e = threadIdx.x + n * Shape::kThreads;
        k = term.column_stride == 1 ? e / kTileColumns : e % kDepth;  // neighbours in memory by neighbouring threads
        j = term.column_stride == 1 ? e % kTileColumns : e / kDepth;
      };
      const auto fetch = [&](Chunk chunk, int slot) {
        const GradientTerm term = gradient_term(a, moments, target, chunk.number);
        const FeatureStage<T>& source = a.stages[term.source];
        copy_block(source.copy_bytes, ring + slot * Tiles::kChunk, kPitch, samples_of(term.source) + chunk.feature,
                   source.sample_stride, samples, kRows, kDepth, source.features - chunk.feature);
        __pipeline_commit();
        const double* const from = term.matrix + chunk.feature * term.stride + first_feature * term.column_stride;
#pragma unroll
        for (int n = 0; n < kCoefficients; ++n) {
          int k, j;
          place(term, n, k, j);
          const bool inside = chunk.feature + k < source.features && first_feature + j < own.features;
          coefficients[n] = inside ? from[k * term.stride + j * term.column_stride] : 0;
        }
      };
      const auto put = [&](Chunk chunk, int slot) {
        const GradientTerm term = gradient_term(a, moments, target, chunk.number);
#pragma unroll
        for (int n = 0; n < kCoefficients; ++n) {
          int k, j;
          place(term, n, k, j);
          matrices[slot * Tiles::kMatrix + k * kTilePitch + j] = static_cast<C>(term.factor * coefficients[n]);
        }
      };
      // The first that there is from here on.
      const auto chunk_from = [&](Chunk chunk) {
        while (chunk.number < terms && chunk.feature >= a.stages[gradient_term(a, moments, target, chunk.number).source].features) {
          chunk = {chunk.number + 1, 0};
        }
        return chunk;
      };

      Tile tile;
      Chunk ahead = chunk_from({0, 0});
      if (ahead.number < terms) {
        fetch(ahead, 0);
        put(ahead, 0);
      }
#pragma unroll 1
      for (int slot = 0; ahead.number < terms; slot ^= 1) {
        const int source = gradient_term(a, moments, target, ahead.number).source;
        __pipeline_wait_prior(0);
        __syncthreads();  // this chunk is there for all threads, and none still reads the one before
        ahead = chunk_from({ahead.number, ahead.feature + kDepth});
        if (ahead.number < terms) fetch(ahead, slot ^ 1);
        T* const chunk = ring + slot * Tiles::kChunk;
        for (int e = threadIdx.x; e < kRows * kDepth; e += Shape::kThreads) {
          const int row = e / kDepth, k = e % kDepth;
          const C x = static_cast<C>(widen(chunk[row * kPitch + k])) * static_cast<C>(inverse_norms[source * kRows + row]);
          if constexpr (Tiles::kAsItComes) {
            chunk[row * kPitch + k] = x;
          } else {
            operand[row * kOperandPitch + k] = x;
          }
        }
        __syncthreads();
        const C* left = operand;
        if constexpr (Tiles::kAsItComes) left = chunk;
        tile.multiply(left, kOperandPitch, matrices + slot * Tiles::kMatrix, kTilePitch);
        if (ahead.number < terms) put(ahead, slot ^ 1);
      }
      __syncthreads();  // shared memory is free

      C sums[Shape::kElements] = {};
      tile.drain(sums);
      Tile::store(tile_of_v, kTilePitch, sums);
      __syncthreads();
      for (int row = warp; row < samples; row += kWarps) {
        const T* const x = samples_of(target) + row * own.sample_stride + first_feature;
        const C r = static_cast<C>(inverse_norms[target * kRows + row]);
        C sum = 0;
        for (int j = lane; j < min(kTileColumns, own.features - first_feature); j += 32) {
          const C element = tile_of_v[row * kTilePitch + j];
          sum += element * (static_cast<C>(widen(x[j])) * r);
          v[static_cast<std::int64_t>(row) * own.features + first_feature + j] = element;
        }
        for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
        if (lane == 0) along[row] += sum;
      }
      __syncthreads();
    }

    for (int row = warp; row < samples; row += kWarps) {
      const T* const x = samples_of(target) + row * own.sample_stride;
      T* const out = a.outs[target].x + group * a.outs[target].group_stride + (first + row) * a.outs[target].sample_stride;
      const double inverse_norm = inverse_norms[target * kRows + row];
      const C r = static_cast<C>(inverse_norm), scale = static_cast<C>(a.group_scale[group]) * r;
      const C projection = inverse_norm >= 1 / a.eps ? C(0) : along[row];  // absent where eps stood in for the norm
      for (int j = lane; j < own.features; j += 32) {
        const C unit = static_cast<C>(widen(x[j])) * r;
        out[j] = Narrow<T>::from(scale * (v[static_cast<std::int64_t>(row) * own.features + j] - projection * unit));
      }
    }
    __syncthreads();
  }
}

template <class T, class C>
__global__ void __launch_bounds__(FmaTile<C, true>::kThreads, 1) gradients_fma(GradientArguments<T> a) {
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  differentiate_samples<T, FmaTile<C, true>, FmaTile<C, true>>(a, shared);
}

using GradientTensorShape = TensorShape<128>;

// From sm_80 on.
template <class T>
__global__ void __launch_bounds__(GradientTensorShape::kThreads, 1) gradients_tensor(GradientArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  differentiate_samples<T, TensorTile<128, true, true>, GradientTensorShape>(a, shared);
#endif
}

}  // namespace icsd::cuda
