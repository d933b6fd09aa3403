// The loss on the rows of the N x N matrices. `rows_forward` sums partial Gram matrices to rows of K and computes each
// row's loss and statistics. `rows_backward` replaces each row of K by a row of [A | r] and sums the loss.
#pragma once

#include <cmath>

#include "core/losses.h"
#include "cuda/kernels/matrices.cuh"
#include "cuda/kernels/norms.cuh"
#include "cuda/runtime/launch.cuh"

namespace icsd::cuda {

constexpr int kForwardThreads = 256, kBackwardThreads = 128;
constexpr int kMaxBlockRows = 8;   // rows of K that a block of `rows_forward` takes
constexpr int kMaxSumThreads = 8;  // threads that add the splits of one element

// Returns the sum of an element over every step-th split from `first` on. Splits are `size` elements apart.
template <class C, class S>
__device__ C sum_splits_of(const S* element, std::int64_t size, int first, int splits, int step) {
  C sum = 0;
#pragma unroll 8
  for (int split = first; split < splits; split += step) sum += static_cast<C>(element[split * size]);
  return sum;
}
template <class C>
__device__ C sum_splits(const Partials& partials, std::int64_t size, std::int64_t element, int first, int step) {
  if (partials.is_double) {
    return sum_splits_of<C>(static_cast<const double*>(partials.data) + element, size, first, partials.splits, step);
  }
  return sum_splits_of<C>(static_cast<const float*>(partials.data) + element, size, first, partials.splits, step);
}

// Calls put(stage, row, j, K_ij), i = first + row, for all columns j of `rows` rows of every stage that has partial
// matrices, partials_of(stage), and, if `diagonal`, put(stage, -1, j, K_jj) for all j. Elements of all stages are
// summed side by side. Each sum is shared by `threads` threads, whose parts meet in `sums`.
template <class C, class PartialsOf, class Put>
__device__ void sum_rows(const PartialsOf& partials_of, int stages, int threads, std::int64_t group, int samples,
                         int first, int rows, bool diagonal, C (&sums)[kForwardThreads * kMaxSumThreads],
                         const Put& put) {
  const int width = kForwardThreads / threads, number = threadIdx.x / width;
  const int of_stage = (rows + diagonal) * samples;
  int all = 0;
  for (int stage = 0; stage < stages; ++stage) {
    if (partials_of(stage).data) all = stages * of_stage;
  }
  const std::int64_t size = packed_size(samples);
  for (int base = 0; base < all; base += kForwardThreads) {
    for (int e = threadIdx.x % width; e < kForwardThreads && base + e < all; e += width) {
      const int stage = (base + e) / of_stage, at = (base + e) % of_stage;
      const Partials& partials = partials_of(stage);
      if (!partials.data) continue;
      const int row = at / samples, j = at % samples, i = row < rows ? first + row : samples;
      const std::int64_t element = group * partials.splits * size + (j <= i ? packed(i, j) : packed(j, i));
      sums[number * kForwardThreads + e] = sum_splits<C>(partials, size, element, number, threads);
    }
    __syncthreads();
    const int e = threadIdx.x, stage = (base + e) / of_stage, at = (base + e) % of_stage;
    if (base + e < all && partials_of(stage).data) {
      C sum = sums[e];
      for (int other = 1; other < threads; ++other) sum += sums[other * kForwardThreads + e];
      const int row = at / samples;
      put(stage, row < rows ? row : -1, at % samples, sum);
    }
    __syncthreads();
  }
}

// Returns the same sum as `sum_rows`, in the same order, from one thread.
template <class C>
__device__ C sum_element(const Partials& partials, std::int64_t size, std::int64_t element, int threads) {
  C sum = sum_splits<C>(partials, size, element, 0, threads);
  for (int number = 1; number < threads; ++number) sum += sum_splits<C>(partials, size, element, number, threads);
  return sum;
}

// Writes K of one stage, (groups, samples, samples). A block takes `block_rows` rows of a group.
template <class C>
__global__ void __launch_bounds__(kForwardThreads)
    sum_gram(Partials partials, int samples, int block_rows, int threads, C* out) {
  __shared__ C sums[kForwardThreads * kMaxSumThreads];
  wait_for_previous();
  const int row_blocks = (samples + block_rows - 1) / block_rows;
  const int first = static_cast<int>(blockIdx.x % row_blocks) * block_rows;
  const std::int64_t group = blockIdx.x / row_blocks;
  const auto partials_of = [&](int) -> const Partials& { return partials; };
  sum_rows(partials_of, 1, threads, group, samples, first, min(block_rows, samples - first), false, sums,
           [&](int, int row, int j, C sum) { out[(group * samples + first + row) * samples + j] = sum; });
}

// Shuffles any struct of numbers down by `lanes` lanes of the warp.
template <class R>
__device__ R shuffle_down(const R& row, int lanes) {
  constexpr int kWords = sizeof(R) / sizeof(int);
  union {
    int words[kWords];
    R row;
  } from{}, to{};
  from.row = row;
#pragma unroll
  for (int k = 0; k < kWords; ++k) to.words[k] = __shfl_down_sync(0xffffffffu, from.words[k], lanes);
  return to.row;
}

// Returns what thread `thread` of the `threads` of a row accumulates over its columns of row i. `s` and `t` are the
// rows of the student's K and of the teacher's.
template <class C, class D>
__device__ typename D::template Row<C> reduce_columns(const D& loss, const C* s, const C* t, const C* norms_s,
                                                      const C* norms_t, int i, int samples, int thread, int threads) {
  typename D::template Row<C> row{};
  for (int j = thread; j < samples; j += threads) {
    if (j == i && !loss.diagonal) continue;
    loss.update(row, norms_s[i] * norms_s[j] * s[j], norms_t[i] * norms_t[j] * t[j]);
  }
  return row;
}

// Merges the rows of a warp's lanes; the first lane has the result.
template <class R, class D>
__device__ R merge_lanes(const D& loss, R row) {
  for (int lanes = 16; lanes > 0; lanes /= 2) loss.merge(row, shuffle_down(row, lanes));
  return row;
}

// Writes the inverse norms of all samples, if `rows_forward` does not compute them in shared memory. Each thread takes
// one sample.
template <class C>
__global__ void __launch_bounds__(kForwardThreads) norms_forward(RowsArguments<C> a, bool similarities) {
  wait_for_previous();
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kForwardThreads + threadIdx.x;
  const std::int64_t stage = item / (a.groups * a.samples), group = item / a.samples % a.groups;
  if (stage > a.students) return;
  const int i = static_cast<int>(item % a.samples);
  const Partials& partials = a.partials[stage];
  C square = 1;
  if (similarities && partials.data) {
    const std::int64_t size = packed_size(a.samples), element = group * partials.splits * size;
    square = sum_element<C>(partials, size, element + packed(a.samples, i), a.sum_threads);
  } else if (similarities) {
    square = a.row(static_cast<int>(stage), group, i)[i];
  }
  a.inverse_norms[item] = similarities ? inverse_norm(square, a.eps) : C(1);
}

template <class C, class D>
__global__ void __launch_bounds__(kForwardThreads, 1) rows_forward(RowsArguments<C> a, D loss) {
  __shared__ C sums[kForwardThreads * kMaxSumThreads];
  ICSD_DYNAMIC_SHARED(C, norms);  // inverse norms of the samples of all stages, if there is room for them
  const int n = a.samples, row_blocks = (n + a.block_rows - 1) / a.block_rows, stages = a.students + 1;
  const int first = static_cast<int>(blockIdx.x % row_blocks) * a.block_rows;
  const int rows = min(a.block_rows, n - first), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t group = blockIdx.x / row_blocks;

  wait_for_previous();
  const auto partials_of = [&](int stage) -> const Partials& { return a.partials[stage]; };
  sum_rows(partials_of, stages, a.sum_threads, group, n, first, rows, !a.norms_known, sums,
           [&](int stage, int row, int j, C sum) {
             if (row < 0) {
               norms[stage * n + j] = loss.similarities ? inverse_norm(sum, a.eps) : C(1);
             } else {
               a.row(stage, group, first + row)[j] = sum;
             }
           });
  const auto norms_of = [&](int stage) -> const C* {
    return a.norms_in_shared ? norms + stage * n : a.inverse_norms + a.index(stage, group, 0);
  };
  if (a.norms_known && a.norms_in_shared) {
    for (int item = threadIdx.x; item < stages * n; item += kForwardThreads) {
      norms[item] = a.inverse_norms[a.index(item / n, group, item % n)];
    }
    __syncthreads();
  }
  admit_next();
  for (int item = threadIdx.x; !a.norms_known && item < stages * rows; item += kForwardThreads) {
    const int stage = item / rows, i = first + item % rows;
    a.inverse_norms[a.index(stage, group, i)] = norms[stage * n + i];
  }
  for (int item = warp; item < a.students * rows; item += kForwardThreads / 32) {
    const int student = item / rows, i = first + item % rows;
    const auto lane_row = reduce_columns(loss, a.row(student, group, i), a.row(a.students, group, i), norms_of(student),
                                         norms_of(a.students), i, n, lane, 32);
    __syncwarp();
    const auto row = merge_lanes(loss, lane_row);
    if (lane == 0) {
      const std::int64_t index = a.index(student, group, i);
      a.values[index] = loss.value(row);
      C statistics[kMaxStatistics];
      loss.statistics(row, statistics);
      for (int m = 0; m < D::kStatistics; ++m) a.statistics[m * a.rows() + index] = statistics[m];
    }
  }
}

// Returns the sum of `x` over the threads of the block to each of them. The order of the sum is fixed.
template <class V>
__device__ V block_sum(V x, V (&sums)[kBackwardThreads / 32]) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_down_sync(0xffffffffu, x, lanes);
  __syncthreads();  // no thread still reads the sums of the previous call
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  V sum = sums[0];
  for (int warp = 1; warp < kBackwardThreads / 32; ++warp) sum += sums[warp];
  return sum;
}

// Writes the loss of a group: the weighted sum of the rows' values.
template <class Arguments>
__device__ void sum_loss(const Arguments& a, std::int64_t group, double (&sums)[kBackwardThreads / 32]) {
  double loss = 0;
  for (int student = 0; student < a.students; ++student) {
    double sum = 0;
    for (int i = threadIdx.x; i < a.samples; i += kBackwardThreads) sum += a.values[a.index(student, group, i)];
    loss += a.weights[student] * block_sum(sum, sums);
  }
  if (threadIdx.x == 0) a.loss[group] = loss;
}

// The gradients of row i of the matrices, computed by the threads of one block.
template <class C, class D>
struct RowGradients {
  const D& loss;
  int samples, i;
  C eps;
  C (&sums)[kBackwardThreads / 32];

  // Replaces row i of K by row i of A, from g_of(j, S_ij) = dL/dS_ij + dL/dS_ji: A_ij = g_j r_j. The diagonal gets the
  // projection on x_i unless eps replaced the norm of x_i. Each thread writes its own columns.
  template <class G>
  __device__ void write(C* row, const C* norms, const G& g_of) const {
    const bool owner = i % kBackwardThreads == threadIdx.x;
    const C own = norms[i], square = owner ? row[i] : C(0);
    C projection = 0;
    for (int j = threadIdx.x; j < samples; j += kBackwardThreads) {
      const C s = own * norms[j] * row[j], g = j == i && !loss.diagonal ? C(0) : g_of(j, s);
      if (j != i) projection += g * s;
      row[j] = g * norms[j];
    }
    projection = block_sum(projection, sums);
    if (owner && loss.similarities && !(std::sqrt(square) < eps)) row[i] = -projection * own;
  }

  // Writes a student's row and adds to the g_j of the teacher, `for_teacher`, unless that is null. `statistics` are
  // those of all rows; one statistic is `stride` elements after the other.
  __device__ void write_student(C* row, const C* norms, const C* t_row, const C* norms_t, const C* statistics,
                                std::int64_t stride, C weight, C* for_teacher) const {
    C own[kMaxStatistics];
    for (int m = 0; m < D::kStatistics; ++m) own[m] = statistics[m * stride + i];
    write(row, norms, [&](int j, C s) {
      const C t = norms_t[i] * norms_t[j] * t_row[j];
      C other[kMaxStatistics];
      for (int m = 0; m < D::kStatistics; ++m) other[m] = statistics[m * stride + j];
      if (for_teacher) for_teacher[j] += weight * loss.teacher(s, t, own, other);
      return weight * loss.student(s, t, own, other);
    });
  }

  __device__ void clear(C* row) const {
    for (int j = threadIdx.x; j < samples; j += kBackwardThreads) row[j] = 0;
  }
};

// One block sums the loss of each group. If gradients are wanted, the blocks after those take one row each.
template <class C, class D>
__global__ void __launch_bounds__(kBackwardThreads, 1) rows_backward(RowsArguments<C> a, D loss) {
  __shared__ double loss_sums[kBackwardThreads / 32];
  __shared__ C sums[kBackwardThreads / 32];
  ICSD_DYNAMIC_SHARED(C, for_teacher);  // g_j of the teacher, if it has a gradient
  wait_for_previous();
  if (blockIdx.x < a.groups) return sum_loss(a, blockIdx.x, loss_sums);
  const int n = a.samples, i = static_cast<int>((blockIdx.x - a.groups) % n);
  const std::int64_t group = (blockIdx.x - a.groups) / n;
  const RowGradients<C, D> gradients{loss, n, i, a.eps, sums};
  const auto norms = [&](int stage) { return a.inverse_norms + a.index(stage, group, 0); };
  C* const t_row = a.row(a.students, group, i);
  if (a.teacher_gradient) gradients.clear(for_teacher);
  for (int student = 0; student < a.students; ++student) {
    gradients.write_student(a.row(student, group, i), norms(student), t_row, norms(a.students),
                            a.statistics + a.index(student, group, 0), a.rows(), a.weights[student],
                            a.teacher_gradient ? for_teacher : nullptr);
  }
  if (a.teacher_gradient) gradients.write(t_row, norms(a.students), [&](int j, C) { return for_teacher[j]; });
  const int rest = a.pitch - n;  // r, then nothing: zeros
  for (int item = threadIdx.x; item < (a.students + 1) * rest; item += kBackwardThreads) {
    const int stage = item / rest, k = item % rest;
    a.row(stage, group, i)[n + k] = k == 0 ? norms(stage)[i] : C(0);
  }
}

}  // namespace icsd::cuda
