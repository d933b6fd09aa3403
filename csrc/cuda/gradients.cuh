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

// Some samples of a stage, whose gradients one block computes.
template <class T, class Tile, class Shape>
struct GradientBlock {
  using Tiles = GradientTiles<T, Shape>;
  using C = typename Tiles::C;
  static constexpr int kRows = Shape::kRows, kDepth = Shape::kDepth, kWarps = Shape::kThreads / 32;
  static constexpr int kPitch = Tiles::kPitch, kOperandPitch = Tiles::kOperandPitch;
  static constexpr int kCoefficients = kDepth * kTileColumns / Shape::kThreads;  // of a chunk, for each thread

  // Some features of a term.
  struct Chunk {
    int number, feature;
  };

  const GradientArguments<T>& a;
  T* ring;
  C *operand, *matrices, *tile, *along;
  double* inverse_norms;  // (stages, rows)
  C* v;                   // dL/dX̂
  int target, first, samples, terms;
  std::int64_t group;
  const double* moments;

  __device__ GradientBlock(const GradientArguments<T>& a, unsigned char* shared)
      : a(a),
        ring(reinterpret_cast<T*>(shared)),
        operand(reinterpret_cast<C*>(shared + 2 * Tiles::kChunk * sizeof(T))),
        matrices(operand + Tiles::kOperand),
        tile(reinterpret_cast<C*>(shared)),
        along(reinterpret_cast<C*>(shared + Tiles::kAlong)),
        inverse_norms(reinterpret_cast<double*>(a.scratch + blockIdx.x * a.scratch_bytes)),
        v(reinterpret_cast<C*>(inverse_norms + (a.students + 1) * kRows)) {}

  __device__ void begin(std::int64_t item) {
    const int ranges = (a.samples + kRows - 1) / kRows;
    first = static_cast<int>(item % ranges) * kRows;
    samples = min(kRows, a.samples - first);
    group = item / ranges % a.groups;
    target = a.targets[item / ranges / a.groups];
    terms = target == a.students ? a.students + 1 : 2;
    moments = a.moments + group * a.matrices.numbers;
  }

  // Whether products of this type are what the group takes.
  __device__ bool is_meant() const {
    if (!a.squares) return true;
    return cancels(a.squares + group * a.matrices.count * kParts, a.students) == std::is_same_v<C, double>;
  }

  __device__ const T* sample(int stage, int row) const {
    const FeatureStage<T>& of = a.stages[stage];
    return of.x + group * of.group_stride + (first + row) * of.sample_stride;
  }
  __device__ GradientTerm term(int number) const { return gradient_term(a, moments, target, number); }

  __device__ void find_norms() const {
    constexpr double largest = std::numeric_limits<Compute<T>>::max();
    for (int number = 0; number < terms; ++number) {
      const int source = term(number).source;
      for (int row = threadIdx.x / 32; row < kRows; row += kWarps) {
        const double square = row < samples ? squared_norm(sample(source, row), a.stages[source].features) : 0;
        if (threadIdx.x % 32 == 0) inverse_norms[source * kRows + row] = inverse_norm(square, a.eps, largest);
      }
    }
  }

  // The chunk itself or, where it is beyond a term's features, the next that there is.
  __device__ Chunk chunk_from(Chunk chunk) const {
    while (chunk.number < terms && chunk.feature >= a.stages[term(chunk.number).source].features) chunk = {chunk.number + 1, 0};
    return chunk;
  }

  // Where a chunk's matrix has this thread's n-th coefficient: neighbors in memory are for neighboring threads.
  static __device__ void place(const GradientTerm& term, int n, int& k, int& j) {
    const int e = threadIdx.x + n * Shape::kThreads;
    k = term.column_stride == 1 ? e / kTileColumns : e % kDepth;
    j = term.column_stride == 1 ? e % kTileColumns : e / kDepth;
  }

  // Samples go to shared memory by themselves, the matrix by way of registers.
  __device__ void fetch(Chunk chunk, int slot, int first_feature, double (&coefficients)[kCoefficients]) const {
    const GradientTerm of = term(chunk.number);
    const FeatureStage<T>& source = a.stages[of.source];
    copy_block(source.copy_bytes, ring + slot * Tiles::kChunk, kPitch, sample(of.source, 0) + chunk.feature,
               source.sample_stride, samples, kRows, kDepth, source.features - chunk.feature);
    __pipeline_commit();
    const double* const from = of.matrix + chunk.feature * of.stride + first_feature * of.column_stride;
#pragma unroll
    for (int n = 0; n < kCoefficients; ++n) {
      int k, j;
      place(of, n, k, j);
      const bool inside = chunk.feature + k < source.features && first_feature + j < a.stages[target].features;
      coefficients[n] = inside ? from[k * of.stride + j * of.column_stride] : 0;
    }
  }
  __device__ void put(Chunk chunk, int slot, const double (&coefficients)[kCoefficients]) const {
    const GradientTerm of = term(chunk.number);
#pragma unroll
    for (int n = 0; n < kCoefficients; ++n) {
      int k, j;
      place(of, n, k, j);
      matrices[slot * Tiles::kMatrix + k * kTilePitch + j] = static_cast<C>(of.factor * coefficients[n]);
    }
  }

  // The samples of a chunk with norm 1.
  __device__ const C* normalize(int source, int slot) const {
    T* const chunk = ring + slot * Tiles::kChunk;
    C* to = operand;
    if constexpr (Tiles::kAsItComes) to = chunk;
    for (int e = threadIdx.x; e < kRows * kDepth; e += Shape::kThreads) {
      const int row = e / kDepth, k = e % kDepth;
      to[row * kOperandPitch + k] =
          static_cast<C>(widen(chunk[row * kPitch + k])) * static_cast<C>(inverse_norms[source * kRows + row]);
    }
    return to;
  }

  // The features of dL/dX̂ from `first_feature` on, in `tile`.
  __device__ void multiply(int first_feature) const {
    Tile product;
    double coefficients[kCoefficients];
    Chunk ahead = chunk_from({0, 0});
    if (ahead.number < terms) {
      fetch(ahead, 0, first_feature, coefficients);
      put(ahead, 0, coefficients);
    }
#pragma unroll 1
    for (int slot = 0; ahead.number < terms; slot ^= 1) {
      const int source = term(ahead.number).source;
      __pipeline_wait_prior(0);
      __syncthreads();  // this chunk is there for all threads, and none still reads the one before
      ahead = chunk_from({ahead.number, ahead.feature + kDepth});
      if (ahead.number < terms) fetch(ahead, slot ^ 1, first_feature, coefficients);
      const C* const left = normalize(source, slot);
      __syncthreads();
      product.multiply(left, kOperandPitch, matrices + slot * Tiles::kMatrix, kTilePitch);
      if (ahead.number < terms) put(ahead, slot ^ 1, coefficients);
    }
    __syncthreads();  // shared memory is free
    C sums[Shape::kElements] = {};
    product.drain(sums);
    Tile::store(tile, kTilePitch, sums);
    __syncthreads();
  }

  // Keeps them, and adds to <dL/dx̂, x̂> of each sample.
  __device__ void keep(int first_feature) const {
    const int features = a.stages[target].features, lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < samples; row += kWarps) {
      const T* const x = sample(target, row) + first_feature;
      const C r = static_cast<C>(inverse_norms[target * kRows + row]);
      C sum = 0;
      for (int j = lane; j < min(kTileColumns, features - first_feature); j += 32) {
        const C element = tile[row * kTilePitch + j];
        sum += element * (static_cast<C>(widen(x[j])) * r);
        v[static_cast<std::int64_t>(row) * features + first_feature + j] = element;
      }
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
      if (lane == 0) along[row] += sum;
    }
  }

  // dL/dX = r (v - <v, x̂> x̂), without the projection where eps stood in for the norm.
  __device__ void project() const {
    const int features = a.stages[target].features;
    const auto& to = a.outs[target];
    for (int row = threadIdx.x / 32; row < samples; row += kWarps) {
      const T* const x = sample(target, row);
      T* const out = to.x + group * to.group_stride + (first + row) * to.sample_stride;
      const double inverse = inverse_norms[target * kRows + row];
      const C r = static_cast<C>(inverse), scale = static_cast<C>(a.group_scale[group]) * r;
      const C projection = inverse >= 1 / a.eps ? C(0) : along[row];
      for (int j = threadIdx.x % 32; j < features; j += 32) {
        const C unit = static_cast<C>(widen(x[j])) * r;
        out[j] = Narrow<T>::from(scale * (v[static_cast<std::int64_t>(row) * features + j] - projection * unit));
      }
    }
  }

  __device__ void run(std::int64_t item) {
    begin(item);
    if (!is_meant()) return;
    find_norms();
    for (int row = threadIdx.x; row < kRows; row += Shape::kThreads) along[row] = 0;
    __syncthreads();
    for (int first_feature = 0; first_feature < a.stages[target].features; first_feature += kTileColumns) {
      multiply(first_feature);
      keep(first_feature);
      __syncthreads();
    }
    project();
    __syncthreads();
  }
};

template <class T, class Tile, class Shape>
__device__ void differentiate_samples(const GradientArguments<T>& a, unsigned char* shared) {
  GradientBlock<T, Tile, Shape> block(a, shared);
#pragma unroll 1
  for (std::int64_t item = blockIdx.x; item < a.items; item += gridDim.x) block.run(item);
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
