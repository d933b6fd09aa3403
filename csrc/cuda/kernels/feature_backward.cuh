// The backward pass of `mse` in feature space: dL/dX̂ = 4w/N² (X̂ (X̂ᵀX̂) - Ŷ (ŶᵀX̂)), then dL/dX. A block takes a tile of a
// stage's samples through all features. It keeps dL/dX̂ in a workspace of its own and writes dL/dX once.
#pragma once

#include <algorithm>

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
  const double* covariances;    // of all groups, see matrices_of
  const double* inverse_norms;  // (stages, groups, samples)
  const Compute<T>* group_scale;
  double eps;
  const double* squares;  // (groups, matrices, splits)
  unsigned char* workspace;
  std::int64_t workspace_bytes;  // of each block
};

// One term of the gradient with respect to a stage: the samples of `source` times a matrix.
template <class C>
struct GradientTerm {
  int source;
  const C* matrix;
  int stride;       // from row to row; or from column to column
  bool by_columns;  // the matrix is stored by columns
  double factor;
};

template <class T, class C>
__device__ GradientTerm<C> gradient_term(const FeatureBackwardArguments<T>& a, const C* covariances, int target,
                                         int number) {
  const int teacher = a.students, student = target == teacher ? number : target;
  if (student == teacher) {  // the last term of the teacher's gradient
    double factor = 0;
    for (int k = 0; k < a.students; ++k) factor += a.factors[k];
    const CovarianceMatrix& own = a.matrices.of[2 * teacher];
    return {teacher, covariances + own.offset, own.columns, false, factor};
  }
  const CovarianceMatrix &own = a.matrices.of[2 * student], &both = a.matrices.of[2 * student + 1];
  if (target == teacher) return {student, covariances + both.offset, both.columns, false, -a.factors[student]};
  if (number == 0) return {student, covariances + own.offset, own.columns, false, a.factors[student]};
  const C* const matrix = covariances + both.offset;
  if constexpr (std::is_same_v<C, double>) return {teacher, matrix, both.columns, true, -a.factors[student]};
  return {teacher, matrix + a.matrices.elements, both.rows, false, -a.factors[student]};  // its transpose
}

// The layout of a block's shared memory: two chunks of samples, the operand made from one of them if their type
// differs, and two chunks of the matrix; or a tile of dL/dX̂. After them, the inner product of each sample and its
// gradient, and the scales of two chunks' samples.
template <class T, class Shape>
struct FeatureBackwardTiles {
  using C = typename Shape::C;
  static constexpr bool kInPlace = std::is_same_v<T, C>;
  static constexpr int kPitch = Shape::kDepth + 16 / sizeof(T), kOperandPitch = Shape::kDepth + 16 / sizeof(C);
  static constexpr int kChunk = Shape::kRows * kPitch, kOperand = kInPlace ? 0 : Shape::kRows * kOperandPitch;
  static constexpr int kTilePitch = Shape::kColumns + 8;  // meets all banks
  static constexpr int kMatrix = Shape::kDepth * kTilePitch;
  static constexpr std::size_t kChunks = 2 * kChunk * sizeof(T) + (kOperand + 2 * kMatrix) * sizeof(C);
  static constexpr std::size_t kTile = Shape::kRows * kTilePitch * sizeof(C);
  static constexpr std::size_t kAlong = kChunks > kTile ? kChunks : kTile;
  static constexpr std::size_t kBytes = kAlong + 3 * Shape::kRows * sizeof(C);
};

// A tile of a stage's samples.
template <class T>
struct FeatureBackwardItem {
  int tile, target;
  std::int64_t group;

  __device__ FeatureBackwardItem(const FeatureBackwardArguments<T>& a, std::int64_t number) {
    constexpr int kRows = FmaTile<double, true>::kRows;  // of every tile
    const int tiles = (a.samples + kRows - 1) / kRows;
    tile = static_cast<int>(number % tiles);
    group = number / tiles % a.groups;
    target = a.targets[number / tiles / a.groups];
  }
};

// The gradients of a tile, which one block computes.
template <class T, class Tile, class Shape>
struct FeatureBackwardBlock {
  using Tiles = FeatureBackwardTiles<T, Shape>;
  using C = typename Tiles::C;
  static constexpr int kRows = Shape::kRows, kColumns = Shape::kColumns, kDepth = Shape::kDepth;
  static constexpr int kPitch = Tiles::kPitch, kOperandPitch = Tiles::kOperandPitch, kTilePitch = Tiles::kTilePitch;
  static constexpr int kWarps = Shape::kThreads / 32;

  // kDepth features of a term.
  struct Chunk {
    int number, feature;
  };

  const FeatureBackwardArguments<T>& a;
  T* chunks;
  C *operand, *matrices, *tile, *along, *scales;
  C* v;  // dL/dX̂
  int target, first, samples, terms;
  std::int64_t group;
  const C* covariances;

  __device__ FeatureBackwardBlock(const FeatureBackwardArguments<T>& a, const FeatureBackwardItem<T>& item,
                                  unsigned char* shared)
      : a(a),
        chunks(reinterpret_cast<T*>(shared)),
        operand(reinterpret_cast<C*>(shared + 2 * Tiles::kChunk * sizeof(T))),
        matrices(operand + Tiles::kOperand),
        tile(reinterpret_cast<C*>(shared)),
        along(reinterpret_cast<C*>(shared + Tiles::kAlong)),
        scales(along + kRows),
        v(reinterpret_cast<C*>(a.workspace + blockIdx.x * a.workspace_bytes)),
        target(item.target),
        first(item.tile * kRows),
        samples(min(kRows, a.samples - first)),
        terms(target == a.students ? a.students + 1 : 2),
        group(item.group),
        covariances(matrices_of<C>(a.covariances, a.matrices, group)) {}

  __device__ const T* sample(int stage, int row) const {
    const FeatureStage<T>& of = a.stages[stage];
    return of.x + group * of.group_stride + (first + row) * of.sample_stride;
  }
  __device__ GradientTerm<C> term(int number) const { return gradient_term(a, covariances, target, number); }

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

  // Copies a chunk of samples and of the matrix asynchronously, and computes the scales of the samples: their inverse
  // norms times the term's factor.
  __device__ void fetch(Chunk chunk, int buffer, int first_feature) const {
    const GradientTerm<C> of = term(chunk.number);
    const FeatureStage<T>& source = a.stages[of.source];
    copy_rectangle(source.copy_bytes, chunks + buffer * Tiles::kChunk, kPitch, sample(of.source, 0) + chunk.feature,
                   source.sample_stride, samples, kRows, kDepth, source.dim - chunk.feature);
    C* const to = matrices + buffer * Tiles::kMatrix;
    const int rows = source.dim - chunk.feature, columns = a.stages[target].dim - first_feature;
    if (of.by_columns) {
      copy_transposed(to, of.matrix + static_cast<std::int64_t>(first_feature) * of.stride + chunk.feature, of.stride,
                      rows, columns);
    } else {
      const std::uint64_t places = reinterpret_cast<std::uintptr_t>(of.matrix) | of.stride * sizeof(C);
      copy_rectangle(places % 16 ? static_cast<int>(sizeof(C)) : 16, to, kTilePitch,
                     of.matrix + static_cast<std::int64_t>(chunk.feature) * of.stride + first_feature, of.stride, rows,
                     kDepth, kColumns, columns);
    }
    __pipeline_commit();
    for (int row = threadIdx.x; row < kRows; row += Shape::kThreads) {
      const double scale = row < samples ? of.factor * inverse_norms(of.source)[row] : 0;
      scales[buffer * kRows + row] = static_cast<C>(scale);
    }
  }

  // Copies a chunk of a matrix that is stored by columns. Neighboring threads take neighbors in memory.
  __device__ void copy_transposed(C* to, const C* from, std::int64_t stride, int rows, int columns) const {
    for (int e = threadIdx.x; e < kDepth * kColumns; e += Shape::kThreads) {
      const int k = e % kDepth, j = e / kDepth;
      C* const element = to + k * kTilePitch + j;
      if (k < rows && j < columns) {
        __pipeline_memcpy_async(element, from + j * stride + k, sizeof(C));
      } else {
        *element = 0;
      }
    }
  }

  // Scales the samples of a chunk and returns them as an operand.
  __device__ const C* scale(int buffer) const {
    T* const chunk = chunks + buffer * Tiles::kChunk;
    C* to = operand;
    if constexpr (Tiles::kInPlace) to = chunk;
    for (int e = threadIdx.x; e < kRows * kDepth; e += Shape::kThreads) {
      const int row = e / kDepth, k = e % kDepth;
      to[row * kOperandPitch + k] = static_cast<C>(widen(chunk[row * kPitch + k])) * scales[buffer * kRows + row];
    }
    return to;
  }

  // Computes the tile of dL/dX̂ that begins with feature `first_feature`.
  __device__ void multiply(int first_feature) const {
    Tile product;
    Chunk ahead = chunk_from({0, 0});
    if (ahead.number < terms) fetch(ahead, 0, first_feature);
#pragma unroll 1
    for (int buffer = 0; ahead.number < terms; buffer ^= 1) {
      __pipeline_wait_prior(0);
      __syncthreads();  // all threads see this chunk, and none still reads the previous one
      ahead = chunk_from({ahead.number, ahead.feature + kDepth});
      if (ahead.number < terms) fetch(ahead, buffer ^ 1, first_feature);
      const C* const left = scale(buffer);
      __syncthreads();
      product.multiply(left, kOperandPitch, matrices + buffer * Tiles::kMatrix, kTilePitch);
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
      for (int j = lane; j < min(kColumns, dim - first_feature); j += 32) {
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

  __device__ void run() const {
    for (int row = threadIdx.x; row < kRows; row += Shape::kThreads) along[row] = 0;
    __syncthreads();
    for (int first_feature = 0; first_feature < a.stages[target].dim; first_feature += kColumns) {
      multiply(first_feature);
      keep(first_feature);
      __syncthreads();
    }
    project();
    __syncthreads();
  }
};

// Computes the gradients of all samples. Where the terms of the loss cancel, its matrices are float64, and so are the
// products.
template <class T, class Tile, class Shape>
__device__ void backward_of_samples(const FeatureBackwardArguments<T>& a, unsigned char* shared) {
  using Exact = FmaTile<double, true>;
  static_assert(Shape::kRows == Exact::kRows && Shape::kThreads == Exact::kThreads);
#pragma unroll 1
  for (std::int64_t number = blockIdx.x; number < a.items; number += gridDim.x) {
    const FeatureBackwardItem<T> item(a, number);
    if constexpr (!std::is_same_v<T, double>) {
      if (cancels(a.squares + item.group * a.matrices.count * kSquareSplits, a.students)) {
        FeatureBackwardBlock<T, AnyTile<double, true>, Exact>(a, item, shared).run();
        continue;
      }
    }
    FeatureBackwardBlock<T, Tile, Shape>(a, item, shared).run();
  }
}

// Bytes of dynamic shared memory of a block.
template <class T, class Shape>
constexpr std::size_t kFeatureBackwardShared =
    std::max(FeatureBackwardTiles<T, Shape>::kBytes, FeatureBackwardTiles<T, FmaTile<double, true>>::kBytes);

template <class T>
__global__ void __launch_bounds__(FmaTile<double, true>::kThreads, 1)
    feature_backward_fma(FeatureBackwardArguments<T> a) {
  using C = Compute<T>;
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  backward_of_samples<T, AnyTile<C, true>, FmaTile<C, true>>(a, shared);
}

using FeatureBackwardTensorShape = TensorShape<128, 1>;

// Runs from sm_80 on.
template <class T>
__global__ void __launch_bounds__(FeatureBackwardTensorShape::kThreads, 1)
    feature_backward_tensor(FeatureBackwardArguments<T> a) {
#if __CUDA_ARCH__ >= 800
  ICSD_DYNAMIC_SHARED(unsigned char, shared);
  wait_for_previous();
  using Tile = TensorTile<FeatureBackwardTensorShape, true, true>;
  backward_of_samples<T, Tile, FeatureBackwardTensorShape>(a, shared);
#endif
}

}  // namespace icsd::cuda
