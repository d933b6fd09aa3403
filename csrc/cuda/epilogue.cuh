// From partial Gram matrices to the loss and to the matrices of the gradients: `measure` adds the partial sums up to rows
// of K and measures them, `differentiate` turns each row of K into a row of [A | r] in its place and adds up the loss.
#pragma once

#include <cmath>

#include "core/losses.h"
#include "cuda/launch.cuh"
#include "cuda/matrices.cuh"
#include "cuda/norms.cuh"

namespace icsd::cuda {

constexpr int kMeasureThreads = 256, kDifferentiateThreads = 128;
constexpr int kMaxBand = 8;  // rows of a block of `measure`

// Σ over every step-th split from `first` on, of matrices of that size.
template <class S, class C>
__device__ C sum_of_splits(const Partials& partials, std::int64_t matrix, std::int64_t element, int first, int step, C sum) {
  const S* const from = static_cast<const S*>(partials.data) + element;
#pragma unroll 4
  for (int split = first; split < partials.splits; split += step) sum += static_cast<C>(from[split * matrix]);
  return sum;
}

// Calls put(row, j, K_row,j) for all columns of `rows` rows from `first` on and, if `diagonal`, put(-1, j, K_jj) for all
// j. The threads of a block share the splits out, too; their sums meet in `sums`.
template <class C, class Put>
__device__ void sum_rows(const Partials& partials, std::int64_t group, int samples, int first, int rows, bool diagonal,
                         C (&sums)[kMeasureThreads * kMaxBand], const Put& put) {
  int ways = 1;
  while (ways < 8 && 2 * ways <= partials.splits) ways *= 2;
  const int width = kMeasureThreads / ways, way = threadIdx.x / width;
  const int all = rows * samples + (diagonal ? samples : 0);
  const std::int64_t matrix = packed_size(samples);
  for (int base = 0; base < all; base += kMeasureThreads) {
    for (int e = threadIdx.x % width; e < kMeasureThreads && base + e < all; e += width) {
      const int row = (base + e) / samples, j = (base + e) % samples, i = row < rows ? first + row : samples;
      const std::int64_t element = group * partials.splits * matrix + (j <= i ? packed(i, j) : packed(j, i));
      sums[way * kMeasureThreads + e] = partials.wide ? sum_of_splits<double>(partials, matrix, element, way, ways, C(0))
                                                      : sum_of_splits<float>(partials, matrix, element, way, ways, C(0));
    }
    __syncthreads();
    const int e = threadIdx.x;
    if (base + e < all) {
      C sum = sums[e];
      for (int other = 1; other < ways; ++other) sum += sums[other * kMeasureThreads + e];
      const int row = (base + e) / samples;
      put(row < rows ? row : -1, (base + e) % samples, sum);
    }
    __syncthreads();
  }
}

// K of one stage: (groups, samples, samples). Blocks take bands of rows, group after group.
template <class C>
__global__ void __launch_bounds__(kMeasureThreads) sum_gram(Partials partials, int samples, int band, C* out) {
  __shared__ C sums[kMeasureThreads * kMaxBand];
  const int bands = (samples + band - 1) / band, first = static_cast<int>(blockIdx.x % bands) * band;
  const std::int64_t group = blockIdx.x / bands;
  sum_rows(partials, group, samples, first, min(band, samples - first), false, sums, [&](int row, int j, C sum) {
    out[(group * samples + first + row) * samples + j] = sum;
  });
}

// Any struct of numbers, from another lane of the warp.
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

// What some of the threads that share row i out find in it; K is that of a student and the teacher's, times the inverse
// norms.
template <class C, class D>
__device__ typename D::template Row<C> measure_part(const D& loss, const C* s, const C* t, const C* norms_s,
                                                    const C* norms_t, int i, int samples, int thread, int threads) {
  typename D::template Row<C> row{};
  for (int j = thread; j < samples; j += threads) {
    if (j == i && !loss.diagonal) continue;
    loss.update(row, norms_s[i] * norms_s[j] * s[j], norms_t[i] * norms_t[j] * t[j]);
  }
  return row;
}

// The parts of a warp's lanes, in its first lane.
template <class R, class D>
__device__ R merge_warp(const D& loss, R row) {
  for (int lanes = 16; lanes > 0; lanes /= 2) loss.merge(row, shuffle_down(row, lanes));
  return row;
}

template <class C, class D>
__global__ void __launch_bounds__(kMeasureThreads, 1) measure(EpilogueArguments<C> a, D loss) {
  __shared__ C sums[kMeasureThreads * kMaxBand];
  ICSD_DYNAMIC_SHARED(C, norms);  // inverse ones, of the teacher's samples and of a student's
  const int n = a.samples, bands = (n + a.band - 1) / a.band, first = static_cast<int>(blockIdx.x % bands) * a.band;
  const int rows = min(a.band, n - first), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t group = blockIdx.x / bands;
  C* const norms_t = norms;
  C* const norms_s = norms + n;

  const auto make_rows = [&](int stage, C* inverse_norms) {
    sum_rows(a.partials[stage], group, n, first, rows, true, sums, [&](int row, int j, C sum) {
      if (row < 0) {
        inverse_norms[j] = loss.similarities ? inverse_norm(sum, a.eps) : C(1);
      } else {
        a.row(stage, group, first + row)[j] = sum;
      }
    });
    for (int row = threadIdx.x; row < rows; row += kMeasureThreads) {
      a.inverse_norms[a.index(stage, group, first + row)] = inverse_norms[first + row];
    }
  };
  make_rows(a.students, norms_t);
  for (int student = 0; student < a.students; ++student) {
    make_rows(student, norms_s);
    for (int k = warp; k < rows; k += kMeasureThreads / 32) {
      const int i = first + k;
      const auto part = measure_part(loss, a.row(student, group, i), a.row(a.students, group, i), norms_s, norms_t, i, n,
                                     lane, 32);
      __syncwarp();
      const auto row = merge_warp(loss, part);
      if (lane == 0) {
        const std::int64_t index = a.index(student, group, i);
        a.values[index] = loss.value(row);
        C numbers[kMaxStatistics];
        loss.statistics(row, numbers);
        for (int m = 0; m < D::kStatistics; ++m) a.statistics[m * a.rows() + index] = numbers[m];
      }
    }
    __syncthreads();  // the norms of this student are no longer read
  }
}

// The sum over the threads of the block, for all of them, in a fixed order.
template <class V>
__device__ V block_sum(V x, V (&sums)[kDifferentiateThreads / 32]) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_down_sync(0xffffffffu, x, lanes);
  __syncthreads();  // the sums of the last call have been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  V sum = sums[0];
  for (int warp = 1; warp < kDifferentiateThreads / 32; ++warp) sum += sums[warp];
  return sum;
}

// The loss of a group.
template <class Arguments>
__device__ void add_up_loss(const Arguments& a, std::int64_t group, double (&sums)[kDifferentiateThreads / 32]) {
  double loss = 0;
  for (int student = 0; student < a.students; ++student) {
    double sum = 0;
    for (int i = threadIdx.x; i < a.samples; i += kDifferentiateThreads) sum += a.values[a.index(student, group, i)];
    loss += a.weights[student] * block_sum(sum, sums);
  }
  if (threadIdx.x == 0) a.loss[group] = loss;
}

// What the threads of a block do to row i of the matrices of a stage.
template <class C, class D>
struct RowGradients {
  const D& loss;
  int samples, i;
  C eps;
  C (&sums)[kDifferentiateThreads / 32];

  // Row i of A in place of K, from g_of(j, S_ij) = dL/dS_ij + dL/dS_ji: A_ij = g_j r_j, and on the diagonal the projection
  // on x_i, which is absent where eps stood in for the norm. Each thread has its own columns.
  template <class G>
  __device__ void write(C* row, const C* norms, const G& g_of) const {
    const bool owner = i % kDifferentiateThreads == threadIdx.x;
    const C own = norms[i], square = owner ? row[i] : C(0);
    C projection = 0;
    for (int j = threadIdx.x; j < samples; j += kDifferentiateThreads) {
      const C s = own * norms[j] * row[j], g = j == i && !loss.diagonal ? C(0) : g_of(j, s);
      if (j != i) projection += g * s;
      row[j] = g * norms[j];
    }
    projection = block_sum(projection, sums);
    if (owner && loss.similarities && !(std::sqrt(square) < eps)) row[i] = -projection * own;
  }

  // A student's row; `statistics` of all rows, number after number, `stride` apart. Adds to the g_j of the teacher unless
  // they are null.
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
    for (int j = threadIdx.x; j < samples; j += kDifferentiateThreads) row[j] = 0;
  }
};

// One block for the loss of each group and, after them, for each row if gradients are wanted.
template <class C, class D>
__global__ void __launch_bounds__(kDifferentiateThreads, 1) differentiate(EpilogueArguments<C> a, D loss) {
  __shared__ double loss_sums[kDifferentiateThreads / 32];
  __shared__ C sums[kDifferentiateThreads / 32];
  ICSD_DYNAMIC_SHARED(C, for_teacher);  // g_j of the teacher if it has a gradient
  if (blockIdx.x < a.groups) return add_up_loss(a, blockIdx.x, loss_sums);
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
  for (int stage = threadIdx.x; stage <= a.students; stage += kDifferentiateThreads) {
    a.row(stage, group, i)[n] = norms(stage)[i];
  }
}

}  // namespace icsd::cuda
