// Norms of samples.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/runtime/element.cuh"

namespace icsd::cuda {

// Returns 1 / max(sqrt(square), eps): 0 for a zero row, NaN if the squared norm exceeds `largest`.
template <class C>
__device__ C inverse_norm(C square, C eps, C largest = std::numeric_limits<C>::max()) {
  constexpr C nan = std::numeric_limits<C>::quiet_NaN();
  if (square == 0) return 0;
  if (!(square <= largest)) return nan;
  const C norm = std::sqrt(square);
  return 1 / (norm > eps ? norm : eps);
}

// Returns the squared norm of a sample in the first lane of the calling warp. The sum is made in float64.
template <class T>
__device__ double squared_norm(const T* sample, std::int64_t dim) {
  double sum = 0;
  for (std::int64_t k = threadIdx.x % 32; k < dim; k += 32) {
    const double element = widen(sample[k]);
    sum += element * element;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
  return sum;
}

}  // namespace icsd::cuda
