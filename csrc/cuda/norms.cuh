// Norms of samples, on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/element.cuh"

namespace icsd::cuda {

// 1 / max(sqrt(K_ii), eps); 0 for a zero row; NaN where the squared norm is beyond the `largest`.
template <class C>
__device__ C inverse_norm(C square, C eps, C largest = std::numeric_limits<C>::max()) {
  constexpr C nan = std::numeric_limits<C>::quiet_NaN();
  if (square == 0) return 0;
  if (!(square <= largest)) return nan;
  const C norm = std::sqrt(square);
  return 1 / (norm > eps ? norm : eps);
}

// Of one sample, summed in float64 by the lanes of a warp; the first lane has it.
template <class T>
__device__ double squared_norm(const T* sample, std::int64_t features) {
  double sum = 0;
  for (std::int64_t k = threadIdx.x % 32; k < features; k += 32) {
    const double element = widen(sample[k]);
    sum += element * element;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
  return sum;
}

}  // namespace icsd::cuda
