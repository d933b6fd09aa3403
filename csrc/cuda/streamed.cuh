// Distillation of many samples: bands of rows of the N x N matrices are made, measured or turned into gradients, and
// forgotten. The norms of all samples come first.
#pragma once

#include "cuda/element.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/norms.cuh"

namespace icsd::cuda {

template <class C>
struct StreamedArguments {
  C weights[kMaxStages];
  int students, samples;
  int first, rows;      // of the band
  int pitch;            // of its rows
  std::int64_t groups;
  C* bands;             // K or A: (stages, groups, rows, pitch)
  C* for_teacher;       // dL/dT_ij + dL/dT_ji: (groups, rows, pitch), or null if the teacher has no gradient
  C* saved;             // (groups, numbers): squared norms (stages, samples), statistics (students, kMaxStatistics, samples)
  C* inverse_norms;     // (stages, groups, samples)
  C* values;            // (students, groups, samples)
  C* loss;              // (groups)
  C eps;

  __device__ std::int64_t index(int stage, std::int64_t group, int i) const {
    return (stage * groups + group) * samples + i;
  }
  // Row i of the matrix, which is one of the band.
  __device__ C* row(int stage, std::int64_t group, int i) const {
    return bands + ((stage * groups + group) * rows + (i - first)) * pitch;
  }
  __device__ C* saved_of(std::int64_t group) const {
    return saved + group * samples * (students + 1 + kMaxStatistics * students);
  }
  __device__ C* statistics(int student, std::int64_t group) const {
    return saved_of(group) + static_cast<std::int64_t>(students + 1 + kMaxStatistics * student) * samples;
  }
};

// Squared norms of a stage's samples, summed in float64, and what they are divided by; a warp for each sample.
constexpr int kNormThreads = 256;

template <class T, class C>
__global__ void __launch_bounds__(kNormThreads)
    find_norms(StreamedArguments<C> a, const T* x, std::int64_t features, std::int64_t group_stride,
               std::int64_t sample_stride, int stage, bool similarities, bool known) {
  const int lane = threadIdx.x % 32;
  const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * (kNormThreads / 32) + threadIdx.x / 32;
  if (item >= a.groups * a.samples) return;
  const std::int64_t group = item / a.samples;
  const int i = static_cast<int>(item % a.samples);
  C* const square = a.saved_of(group) + static_cast<std::int64_t>(stage) * a.samples + i;
  if (!known) {
    const double sum = squared_norm(x + group * group_stride + i * sample_stride, features);
    if (lane == 0) *square = static_cast<C>(sum);
  }
  if (lane == 0) a.inverse_norms[a.index(stage, group, i)] = similarities ? inverse_norm(*square, a.eps) : C(1);
}

// A block for each row of the band.
template <class C, class D>
__global__ void __launch_bounds__(kDifferentiateThreads) measure_band(StreamedArguments<C> a, D loss) {
  using Row = typename D::template Row<C>;
  constexpr int kWarps = kDifferentiateThreads / 32;
  __shared__ __align__(16) unsigned char memory[kWarps * sizeof(Row)];
  Row* const parts = reinterpret_cast<Row*>(memory);
  const int in_band = min(a.rows, a.samples - a.first), i = a.first + static_cast<int>(blockIdx.x % in_band);
  const std::int64_t group = blockIdx.x / in_band;
  for (int student = 0; student < a.students; ++student) {
    const auto part = measure_part(loss, a.row(student, group, i), a.row(a.students, group, i),
                                   a.inverse_norms + a.index(student, group, 0),
                                   a.inverse_norms + a.index(a.students, group, 0), i, a.samples,
                                   static_cast<int>(threadIdx.x), kDifferentiateThreads);
    __syncwarp();
    Row row = merge_warp(loss, part);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = row;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < kWarps; ++warp) loss.merge(row, parts[warp]);
      a.values[a.index(student, group, i)] = loss.value(row);
      C numbers[kMaxStatistics] = {};
      loss.statistics(row, numbers);
      for (int m = 0; m < kMaxStatistics; ++m) {
        a.statistics(student, group)[static_cast<std::int64_t>(m) * a.samples + i] = m < D::kStatistics ? numbers[m] : C(0);
      }
    }
    __syncthreads();
  }
}

template <class C>
__global__ void __launch_bounds__(kDifferentiateThreads) add_up_losses(StreamedArguments<C> a) {
  __shared__ double sums[kDifferentiateThreads / 32];
  add_up_loss(a, blockIdx.x, sums);
}

// K to A, a block for each row of the band.
template <class C, class D>
__global__ void __launch_bounds__(kDifferentiateThreads, 1) differentiate_band(StreamedArguments<C> a, D loss) {
  __shared__ C sums[kDifferentiateThreads / 32];
  const int in_band = min(a.rows, a.samples - a.first), i = a.first + static_cast<int>(blockIdx.x % in_band);
  const std::int64_t group = blockIdx.x / in_band;
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
