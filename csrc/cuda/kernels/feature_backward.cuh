// The backward pass of `mse` in feature space: dL/dX̂ = 4w/N² (X̂ (X̂ᵀX̂) - Ŷ (ŶᵀX̂)), then dL/dX. A block takes a tile of a
// stage's samples through all features. It keeps dL/dX̂ in a workspace of its own and writes dL/dX once.
#pragma once

#include "cuda/kernels/covariance.cuh"

namespace icsd::cuda {

template <class T>
struct FeatureBackwardArguments {
  FeatureStage<T> stages[kMaxStages];
  struct Out {
    T* x;
    std::int64_t group_stride, sample_stride;
  } outs[kMaxStages];
  int targets[kMaxStages], target_count;  // stages whose gradients are wanted
  CovarianceMatrices matrices;
  double factors[kMaxStages];  // 4w / N² of the students
  int students, samples;
  std::int64_t items;  // targets x groups x tiles of samples
  std::int64_t groups;
  const double* covariances;    // (groups, elements)
  const double* inverse_norms;  // (stages, groups, samples)
  const Compute<T>* group_scale;
  double eps;
  // (groups, matrices, splits), or null. If given, float32 kernels take the groups that do not cancel, float64 kernels
  // those that do.
  const double* squares;
  unsigned char* workspace;
  std::int64_t workspace_bytes;  // of each block
};

// One term of the gradient with respect to a stage: the samples of `source` times a matrix.
struct GradientTerm {
  int source;
  const double* matrix;
  int stride, column_stride;  // from row to row, from column to column
  double factor;
};

template <class T>
__device__ GradientTerm gradient_term(const FeatureBackwardArguments<T>& a, const double* covariances, int target,
                                      int number) {
  const int teacher = a.students, student = target == teacher ? number : target;
  if (student == teacher) {  // the last term of the teacher's gradient
    double factor = 0;
    for (int k = 0; k < a.students; ++k) factor += a.factors[k];
    const CovarianceMatrix& own = a.matrices.of[2 * teacher];
    return {teacher, covariances + own.offset, own.columns, 1, factor};
  }
  const CovarianceMatrix &own = a.matrices.of[2 * student], &both = a.matrices.of[2 * student + 1];
  if (target == teacher) return {student, covariances + both.offset, both.columns, 1, -a.factors[student]};
  if (number == 0) return {student, covariances + own.offset, own.columns, 1, a.factors[student]};
  return {teacher, covariances + both.offset, 1, both.columns, -a.factors[student]};
}

// The layout of a block's shared memory: two chunks of samples, the operand made from one of them if their type
// differs, and two chunks of the matrix; or a tile of dL/dX̂. After them, the inner product of each sample and its
// gradient, and the inverse norms of two chunks' samples.
template <class T, class Shape>
struct FeatureBackwardTiles {
  using C = typename Shape::C;
  static constexpr bool kInPlace = std::is_same_v<T, C>;
  static constexpr int kPitch = Shape::kDepth + 16 / sizeof(T), kOperandPitch = Shape::kDepth + 16 / sizeof(C);
  static constexpr int kChunk = Shape::kRows * kPitch, kOperand = kInPlace ? 0 : Shape::kRows * kOperandPitch;
  static constexpr int kMatrix = Shape::kDepth * kTilePitch;
  static constexpr std::size_t kChunks = 2 * kChunk * sizeof(T) + (kOperand + 2 * kMatrix) * sizeof(C);
  static constexpr std::size_t kTile = Shape::kRows * kTilePitch * sizeof(C);
  static constexpr std::size_t kAlong = kChunks > kTile ? kChunks : kTile;
  static constexpr std::size_t kBytes = kAlong + 3 * Shape::kRows * sizeof(C);

  // Bytes of a block's workspace: dL/dX̂.
  static std::size_t workspace(std::int64_t dim) { return (Shape::kRows * dim * sizeof(C) + 255) / 256 * 256; }
};

// A tile of a stage's samples, whose gradients one block computes.
template <class T, class Tile, class Shape>
struct FeatureBackwardBlock {
  using Tiles = FeatureBackwardTiles<T, Shape>;
  using C = typename Tiles::C;
  static constexpr int kRows = Shape::kRows, kDepth = Shape::kDepth, kWarps = Shape::kThreads / 32;
  static constexpr int kPitch = Tiles::kPitch, kOperandPitch = Tiles::kOperandPitch;
  static constexpr int kCoefficients = kDepth * kTileColumns / Shape::kThreads;  // of a chunk, per thread

  // kDepth features of a term.
  struct Chunk {
    int number, feature;
  };

  const FeatureBackwardArguments<T>& a;
  T* chunks;
  C *operand, *matrices, *tile, *along, *norms;
  C* v;  // dL/dX̂
  int target, first, samples, terms;
  std::int64_t group;
  const double* covariances;

  __device__ FeatureBackwardBlock(const FeatureBackwardArguments<T>& a, unsigned char* shared)
      : a(a),
        chunks(reinterpret_cast<T*>(shared)),
        operand(reinterpret_cast<C*>(shared + 2 * Tiles::kChunk * sizeof(T))),
        matrices(operand + Tiles::kOperand),
        tile(reinterpret_cast<C*>(shared)),
        along(reinterpret_cast<C*>(shared + Tiles::kAlong)),
        norms(along + kRows),
        v(reinterpret_cast<C*>(a.workspace + blockIdx.x * a.workspace_bytes)) {}

  __device__ void begin(std::int64_t item) {
    const int tiles = (a.samples + kRows - 1) / kRows;
    first = static_cast<int>(item % tiles) * kRows;
    samples = min(kRows, a.samples - first);
    group = item / tiles % a.groups;
    target = a.targets[item / tiles / a.groups];
    terms = target == a.students ? a.students + 1 : 2;
    covariances = a.covariances + group * a.matrices.elements;
  }

  // Returns true if the group is one for products of type C.
  __device__ bool takes_group() const {
    if (!a.squares) return true;
    return cancels(a.squares + group * a.matrices.count * kSquareSplits, a.students) == std::is_same_v<C, double>;
  }

  __device__ const T* sample(int stage, int row) const {
    const FeatureStage<T>& of = a.stages[stage];
    return of.x + group * of.group_stride + (first + row) * of.sample_stride;
  }
  __device__ GradientTerm term(int number) const { return gradient_term(a, covariances, target, number); }

  // Returns the inverse norms of the tile's samples of a stage.
  __device__ const double* inverse_norms(int stage) const {
    return a.inverse_norms + (stage * a.groups + group) * a.samples + first;
  }

  // Returns the chunk itself or, if it lies beyond a term's features, the first chunk of the next term with features.
  __device__ Chunk chunk_from(Chunk chunk) const {
    while (chunk.number < terms && chunk.feature >= a.stages[term(chunk.number).source].dim) {
      chunk = {chunk.number + 1, 0};
    }
    return chunk;
  }

  // The positions (k, j) of a thread's coefficients in a chunk of the matrix, one step after the other. Neighboring
  // threads take neighbors in memory.
  struct Places {
    int k, j, k_step, j_step;

    __device__ explicit Places(const GradientTerm& term) {
      const int thread = threadIdx.x;
      const bool by_rows = term.column_stride == 1;
      k = by_rows ? thread / kTileColumns : thread % kDepth;
      j = by_rows ? thread % kTileColumns : thread / kDepth;
      k_step = by_rows ? Shape::kThreads / kTileColumns : 0;
      j_step = by_rows ? 0 : Shape::kThreads / kDepth;
    }
  };

  // Copies the samples of a chunk asynchronously and their inverse norms; the chunk of the matrix passes through
  // registers.
  __device__ void fetch(Chunk chunk, int buffer, int first_feature, double (&coefficients)[kCoefficients]) const {
    const GradientTerm of = term(chunk.number);
    const FeatureStage<T>& source = a.stages[of.source];
    copy_rectangle(source.copy_bytes, chunks + buffer * Tiles::kChunk, kPitch, sample(of.source, 0) + chunk.feature,
                   source.sample_stride, samples, kRows, kDepth, source.dim - chunk.feature);
    __pipeline_commit();
    for (int row = threadIdx.x; row < kRows; row += Shape::kThreads) {
      norms[buffer * kRows + row] = row < samples ? static_cast<C>(inverse_norms(of.source)[row]) : C(0);
    }
    const Places places(of);
    const auto offset = [&](int k, int j) {
      return static_cast<std::int64_t>(k) * of.stride + static_cast<std::int64_t>(j) * of.column_stride;
    };
    const double* from = of.matrix + offset(chunk.feature + places.k, first_feature + places.j);
    const std::int64_t step = offset(places.k_step, places.j_step);
    const int rows = source.dim - chunk.feature - places.k, columns = a.stages[target].dim - first_feature - places.j;
#pragma unroll
    for (int n = 0; n < kCoefficients; ++n, from += step) {
      coefficients[n] = n * places.k_step < rows && n * places.j_step < columns ? *from : 0;
    }
  }
  __device__ void put(Chunk chunk, int buffer, const double (&coefficients)[kCoefficients]) const {
    const GradientTerm of = term(chunk.number);
    const Places places(of);
    C* const to = matrices + buffer * Tiles::kMatrix + places.k * kTilePitch + places.j;
    const int step = places.k_step * kTilePitch + places.j_step;
#pragma unroll
    for (int n = 0; n < kCoefficients; ++n) to[n * step] = static_cast<C>(of.factor * coefficients[n]);
  }

  // Divides the samples of a chunk by their norms and returns them as an operand.
  __device__ const C* normalize(int buffer) const {
    T* const chunk = chunks + buffer * Tiles::kChunk;
    C* to = operand;
    if constexpr (Tiles::kInPlace) to = chunk;
    for (int e = threadIdx.x; e < kRows * kDepth; e += Shape::kThreads) {
      const int row = e / kDepth, k = e % kDepth;
      to[row * kOperandPitch + k] = static_cast<C>(widen(chunk[row * kPitch + k])) * norms[buffer * kRows + row];
    }
    return to;
  }

  // Computes the tile of dL/dX̂ that begins with feature `first_feature`.
  __device__ void multiply(int first_feature) const {
    Tile product;
    double coefficients[kCoefficients];
    Chunk ahead = chunk_from({0, 0});
    if (ahead.number < terms) {
      fetch(ahead, 0, first_feature, coefficients);
      put(ahead, 0, coefficients);
    }
#pragma unroll 1
    for (int buffer = 0; ahead.number < terms; buffer ^= 1) {
      __pipeline_wait_prior(0);
      __syncthreads();  // all threads see this chunk, and none still reads the previous one
      ahead = chunk_from({ahead.number, ahead.feature + kDepth});
      if (ahead.number < terms) fetch(ahead, buffer ^ 1, first_feature, coefficients);
      const C* const left = normalize(buffer);
      __syncthreads();
      product.multiply(left, kOperandPitch, matrices + buffer * Tiles::kMatrix, kTilePitch);
      if (ahead.number < terms) put(ahead, buffer ^ 1, coefficients);
    }
    __syncthreads();  // shared memory is free
    C sums[Shape::kElements] = {};
    product.drain(sums);
    Tile::store(tile, kTilePitch, sums);
    __syncthreads();
  }

  // Moves the tile to the workspace and adds its share of <dL/dx̂, x̂> to the sum of each sample.
  __device__ void keep(int first_feature) const {
    const int dim = a.stages[target].dim, lane = threadIdx.x % 32;
    for (int row = threadIdx.x / 32; row < samples; row += kWarps) {
      const T* const x = sample(target, row) + first_feature;
      const C r = static_cast<C>(inverse_norms(target)[row]);
      C sum = 0;
      for (int j = lane; j < min(kTileColumns, dim - first_feature); j += 32) {
        const C element = tile[row * kTilePitch + j];
        sum += element * (static_cast<C>(widen(x[j])) * r);
        v[static_cast<std::int64_t>(row) * dim + first_feature + j] = element;
      }
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
      if (lane == 0) along[row] += sum;
    }
  }

  // Writes dL/dX = r (v - <v, x̂> x̂), without the projection if eps replaced the norm.
  __device__ void project() const {
    const int dim = a.stages[target].dim;
    const auto& to = a.outs[target];
    for (int row = threadIdx.x / 32; row < samples; row += kWarps) {
      const T* const x = sample(target, row);
      T* const out = to.x + group * to.group_stride + (first + row) * to.sample_stride;
      const double inverse = inverse_norms(target)[row];
      const C r = static_cast<C>(inverse), scale = static_cast<C>(a.group_scale[group]) * r;
      const C projection = inverse >= 1 / a.eps ? C(0) : along[row];
      for (int j = threadIdx.x % 32; j < dim; j += 32) {
        const C unit = static_cast<C>(widen(x[j])) * r;
        out[j] = Narrow<T>::from(scale * (v[static_cast<std::int64_t>(row) * dim + j] - projection * unit));
      }
    }
  }

  __device__ void run(std::int64_t item) {
    begin(item);
    if (!takes_group()) return;
    for (int row = threadIdx.x; row < kRows; row += Shape::kThreads) along[row] = 0;
    __syncthreads();
    for (int first_feature = 0; first_feature < a.stages[target].dim; first_feature += kTileColumns) {
      multiply(first_feature);
      keep(first_feature);
      __syncthreads();
    }
    project();
    __syncthreads();
  }
};

template <class T, class Tile, class Shape>
__device__ void backward_of_samples(const FeatureBackwardArguments<T>& a, unsigned char* shared) {
  FeatureBackwardBlock<T, Tile, Shape> block(a, shared);
#pragma unroll 1
  for (std::int64_t item = blockIdx.x; item < a.items; item += gridDim.x) block.run(item);
}

template <class T, class C>
__global__ void __launch_bounds__(FmaTile<C, true>::kThreads, 1) feature_backward_fma(FeatureBackwardArguments<T> a) {
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  backward_of_samples<T, AnyTile<C, true>, FmaTile<C, true>>(a, shared);
}

using FeatureBackwardTensorShape = TensorShape<64>;

// Runs from sm_80 on.
template <class T>
__global__ void __launch_bounds__(FeatureBackwardTensorShape::kThreads, 1)
    feature_backward_tensor(FeatureBackwardArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  backward_of_samples<T, TensorTile<64, true, true>, FeatureBackwardTensorShape>(a, shared);
#endif
}

}  // namespace icsd::cuda
