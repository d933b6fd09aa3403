// The loss on row blocks of the N x N matrices, for many samples. Each row block of K is computed
// (`launch_gram_row_block`), used by `row_block_forward` or `row_block_backward`, and overwritten by the next. The
// norms of all samples come first.
#pragma once

#include "cuda/kernels/norms.cuh"
#include "cuda/kernels/rows.cuh"
#include "cuda/runtime/element.cuh"

namespace icsd::cuda {

// Computes the squared norms of a stage's samples, unless they are known, and the inverse norms. Each warp takes one
// sample.
constexpr int kNormThreads = 256;

template <class T, class C>
__global__ void __launch_bounds__(kNormThreads)
    compute_norms(StreamedArguments<C> a, const T* x, std::int64_t dim, std::int64_t group_stride,
                  std::int64_t sample_stride, int stage, bool similarities, bool known) {
  wait_for_previous();
  admit_next();
  const int lane = threadIdx.x % 32;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kNormThreads / 32) + threadIdx.x / 32;
  if (item >= a.groups * a.samples) return;
  const std::int64_t group = item / a.samples;
  const int i = static_cast<int>(item % a.samples);
  C* const square = a.saved_of(group) + static_cast<std::int64_t>(stage) * a.samples + i;
  if (!known) {
    const double sum = squared_norm(x + group * group_stride + i * sample_stride, dim);
    if (lane == 0) *square = static_cast<C>(sum);
  }
  if (lane == 0) a.inverse_norms[a.index(stage, group, i)] = similarities ? inverse_norm(*square, a.eps) : C(1);
}

// Each block takes one row of the row block.
template <class C, class D>
__global__ void __launch_bounds__(kBackwardThreads) row_block_forward(StreamedArguments<C> a, D loss) {
  using Row = typename D::template Row<C>;
  constexpr int kWarps = kBackwardThreads / 32;
  __shared__ __align__(16) unsigned char memory[kWarps * sizeof(Row)];
  Row* const rows_of_warps = reinterpret_cast<Row*>(memory);
  wait_for_previous();
  admit_next();
  const int rows = min(a.rows, a.samples - a.first), i = a.first + static_cast<int>(blockIdx.x % rows);
  const std::int64_t group = blockIdx.x / rows;
  for (int student = 0; student < a.students; ++student) {
    const auto lane_row = reduce_columns(
        loss, a.row(student, group, i), a.row(a.students, group, i), a.inverse_norms + a.index(student, group, 0),
        a.inverse_norms + a.index(a.students, group, 0), i, a.samples, static_cast<int>(threadIdx.x), kBackwardThreads);
    __syncwarp();
    Row row = merge_lanes(loss, lane_row);
    if (threadIdx.x % 32 == 0) rows_of_warps[threadIdx.x / 32] = row;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kWarps; ++warp) loss.merge(row, rows_of_warps[warp]);
      a.values[a.index(student, group, i)] = loss.value(row);
      C statistics[kMaxStatistics] = {};
      loss.statistics(row, statistics);
      for (int m = 0; m < kMaxStatistics; ++m) {
        a.statistics(student, group)[static_cast<std::int64_t>(m) * a.samples + i] =
            m < D::kStatistics ? statistics[m] : C(0);
      }
    }
    __syncthreads();
  }
}

template <class C>
__global__ void __launch_bounds__(kBackwardThreads) sum_losses(StreamedArguments<C> a) {
  __shared__ double sums[kBackwardThreads / 32];
  wait_for_previous();
  sum_loss(a, blockIdx.x, sums);
}

// Replaces K by A. Each block takes one row of the row block.
template <class C, class D>
__global__ void __launch_bounds__(kBackwardThreads, 1) row_block_backward(StreamedArguments<C> a, D loss) {
  __shared__ C sums[kBackwardThreads / 32];
  wait_for_previous();
  admit_next();
  const int rows = min(a.rows, a.samples - a.first), i = a.first + static_cast<int>(blockIdx.x % rows);
  const std::int64_t group = blockIdx.x / rows;
  const RowGradients<C, D> gradients{loss, a.samples, i, a.eps, sums};
  const auto norms = [&](int stage) { return a.inverse_norms + a.index(stage, group, 0); };
  C* const t_row = a.row(a.students, group, i);
  C* const for_teacher = a.for_teacher ? a.for_teacher + (group * a.rows + (i - a.first)) * a.pitch : nullptr;
  if (for_teacher) gradients.clear(for_teacher);
  for (int student = 0; student < a.students; ++student) {
    gradients.write_student(a.row(student, group, i), norms(student), t_row, norms(a.students),
                            a.statistics(student, group), a.samples, a.weights[student], for_teacher);
  }
  if (for_teacher) gradients.write(t_row, norms(a.students), [&](int j, C) { return for_teacher[j]; });
}

}  // namespace icsd::cuda
