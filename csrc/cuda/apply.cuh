// Products of small matrices with features, out = diag(row scale) matrix X, group by group: the gradients from [A | r].
#pragma once

#include "cuda/launch.cuh"
#include "cuda/operator.h"
#include "cuda/panel.cuh"

namespace icsd::cuda {

template <class T>
struct ApplyStage {
  const T* x;
  T* out;
  std::int64_t features, x_group_stride, x_sample_stride, out_group_stride, out_sample_stride;
  const void* matrix;     // (groups, outputs, samples)
  const void* row_scale;  // one for each output, as far apart as the rows, or null
  std::int64_t matrix_group_stride;
  unsigned first_block;
};

template <class T>
struct ApplyArguments {
  ApplyStage<T> stages[kMaxStages];
  int count;
  int outputs, samples;
  int matrix_stride;        // from row to row
  bool wide;                // matrices and scales are float64, else float32
  const void* group_scale;  // one for each group, or null
};

template <class C>
__device__ C coefficient(const void* data, bool wide, std::int64_t index) {
  return wide ? static_cast<C>(static_cast<const double*>(data)[index]) : static_cast<C>(static_cast<const float*>(data)[index]);
}

// What one block computes: columns [first_feature, ...) of the outputs [first_output, ...) of a group.
template <class T>
struct ApplyItem {
  const ApplyStage<T>& stage;
  std::int64_t group, first_feature;
  int first_output;

  __device__ ApplyItem(const ApplyArguments<T>& a, int tile_outputs, int tile_features)
      : stage(stage_of_block(a)) {
    const std::int64_t tiles = (stage.features + tile_features - 1) / tile_features;
    const int bands = (a.outputs + tile_outputs - 1) / tile_outputs;
    const std::int64_t item = blockIdx.x - stage.first_block, whole = item / tiles;
    first_feature = item % tiles * tile_features;
    first_output = static_cast<int>(whole % bands) * tile_outputs;
    group = whole / bands;
  }

  static __device__ const ApplyStage<T>& stage_of_block(const ApplyArguments<T>& a) {
    int k = a.count - 1;
    while (blockIdx.x < a.stages[k].first_block) --k;
    return a.stages[k];
  }

  template <class C>
  __device__ C element(const ApplyArguments<T>& a, int output, int sample) const {
    return coefficient<C>(stage.matrix, a.wide,
                          group * stage.matrix_group_stride + static_cast<std::int64_t>(output) * a.matrix_stride + sample);
  }
  template <class C>
  __device__ C scale(const ApplyArguments<T>& a, int output) const {
    const C row = stage.row_scale ? coefficient<C>(stage.row_scale, a.wide,
                                                   group * stage.matrix_group_stride +
                                                       static_cast<std::int64_t>(output) * a.matrix_stride)
                                  : C(1);
    return a.group_scale ? row * coefficient<C>(a.group_scale, a.wide, group) : row;
  }
};

// By fused multiply-adds, for any type on any device: tiles of 64 outputs and 64 features, each thread 4 x 4, 16 apart.
constexpr int kFmaTile = 64, kFmaSamples = 32;

template <class T>
__global__ void __launch_bounds__(256) apply_fma(ApplyArguments<T> a) {
  using C = Compute<T>;
  __shared__ C matrix[kFmaTile][kFmaSamples + 1];
  __shared__ C x[kFmaSamples][kFmaTile];
  const ApplyItem<T> item(a, kFmaTile, kFmaTile);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const T* const features = item.stage.x + item.group * item.stage.x_group_stride + item.first_feature;
  const std::int64_t left = item.stage.features - item.first_feature;
  C sums[4][4] = {};
  for (int first = 0; first < a.samples; first += kFmaSamples) {
    for (int e = threadIdx.x; e < kFmaTile * kFmaSamples; e += blockDim.x) {
      const int row = e / kFmaSamples, column = e % kFmaSamples;
      const bool inside = item.first_output + row < a.outputs && first + column < a.samples;
      matrix[row][column] = inside ? item.template element<C>(a, item.first_output + row, first + column) : C(0);
    }
    for (int e = threadIdx.x; e < kFmaSamples * kFmaTile; e += blockDim.x) {
      const int row = e / kFmaTile, column = e % kFmaTile;
      const bool inside = first + row < a.samples && column < left;
      x[row][column] = inside ? widen(features[(first + row) * item.stage.x_sample_stride + column]) : C(0);
    }
    __syncthreads();
    C part[4][4] = {};
#pragma unroll 8
    for (int k = 0; k < kFmaSamples; ++k) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) part[m][n] += matrix[ty + 16 * m][k] * x[k][tx + 16 * n];
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sums[m][n] += part[m][n];
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int output = item.first_output + ty + 16 * m;
    if (output >= a.outputs) continue;
    const C scale = item.template scale<C>(a, output);
    T* const out = item.stage.out + item.group * item.stage.out_group_stride + output * item.stage.out_sample_stride;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = tx + 16 * n;
      if (column < left) out[item.first_feature + column] = Narrow<T>::from(scale * sums[m][n]);
    }
  }
}

}  // namespace icsd::cuda
