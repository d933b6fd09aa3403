// Centered features for the Gram kernel and, at the other end, the matrices of the gradients for features that are not
// centered.
#pragma once

#include "cuda/kernels/rows.cuh"
#include "cuda/runtime/element.cuh"
#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

template <class T>
struct CenterStage {
  const T* x;
  Compute<T>* out;  // (groups, samples, dim)
  std::int64_t dim, group_stride, sample_stride;
  unsigned first_block;
};

template <class T>
struct CenterArguments {
  CenterStage<T> stages[kMaxStages];
  int count, samples;
};

constexpr int kCenterThreads = 256;

// Subtracts the mean of all samples of a group from each. The differences to the first sample are made before: they are
// exact where the mean is large, and 0 for equal samples. Each thread takes one feature.
template <class T>
__global__ void __launch_bounds__(kCenterThreads) center_features(CenterArguments<T> a) {
  using C = Compute<T>;
  int k = a.count - 1;
  while (blockIdx.x < a.stages[k].first_block) --k;
  const CenterStage<T>& stage = a.stages[k];
  const std::int64_t blocks = (stage.dim + kCenterThreads - 1) / kCenterThreads;
  const std::int64_t block = blockIdx.x - stage.first_block, group = block / blocks;
  const std::int64_t feature = block % blocks * kCenterThreads + threadIdx.x;
  if (feature >= stage.dim) return;
  const T* const x = stage.x + group * stage.group_stride + feature;
  C* const out = stage.out + group * a.samples * stage.dim + feature;
  const C first = widen(*x);
  C sum = 0;
#pragma unroll 4
  for (int i = 0; i < a.samples; ++i) sum += widen(x[i * stage.sample_stride]) - first;
  const C mean = sum / static_cast<C>(a.samples);
#pragma unroll 4
  for (int i = 0; i < a.samples; ++i) out[i * stage.dim] = (widen(x[i * stage.sample_stride]) - first) - mean;
}

// Writes the means of the rows of M = diag(r) A, which is symmetric, for all rows of some stages. Each warp takes one.
template <class C>
__global__ void __launch_bounds__(kBackwardThreads) compute_row_means(RowsArguments<C> a, std::int64_t rows, C* means) {
  wait_for_previous();
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kBackwardThreads / 32) + threadIdx.x / 32;
  if (item >= rows) return;
  const C* const row = a.saved + item * a.pitch;
  C sum = 0;
  for (int j = threadIdx.x % 32; j < a.samples; j += 32) sum += row[j];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
  if (threadIdx.x % 32 == 0) means[item] = row[a.samples] * sum / static_cast<C>(a.samples);
}

// Replaces [A | r] by [H M H | 1], H = I - 1/N. Its rows sum to 0: the diagonal is made so that they do after rounding,
// too, because the product with the features would multiply what is left by the mean sample. Each block takes one row.
template <class C>
__global__ void __launch_bounds__(kBackwardThreads) center_rows(RowsArguments<C> a, const C* means) {
  wait_for_previous();
  __shared__ C sums[kBackwardThreads / 32];
  const int n = a.samples, i = static_cast<int>(blockIdx.x % n);
  C* const row = a.saved + static_cast<std::int64_t>(blockIdx.x) * a.pitch;
  const C* const of_matrix = means + (blockIdx.x - i);
  const C r = row[n];
  C total = 0, others = 0;
  for (int j = threadIdx.x; j < n; j += kBackwardThreads) total += of_matrix[j];
  const C shift = of_matrix[i] - block_sum(total, sums) / static_cast<C>(n);
  for (int j = threadIdx.x; j < n; j += kBackwardThreads) {
    const C element = (r * row[j] - of_matrix[j]) - shift;
    row[j] = element;
    if (j != i) others += element;
  }
  others = block_sum(others, sums);
  if (threadIdx.x == 0) {
    row[i] = -others;
    row[n] = 1;
  }
}

}  // namespace icsd::cuda
