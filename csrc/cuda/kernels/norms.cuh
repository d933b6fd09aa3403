// Norms of samples.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/kernels/compensated.cuh"
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

template <class T>
__device__ double squared_norm_in_float64(const T* sample, std::int64_t dim) {
  double sum = 0;
  for (std::int64_t k = threadIdx.x % 32; k < dim; k += 32) {
    const double element = widen(sample[k]);
    sum += element * element;
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
  return sum;
}

// Returns the squared norm of a sample in the first lane of the calling warp, nearly as accurate as float64's sum.
//
// For other types it is a compensated sum of squares in float32, with their errors: those of two float32 numbers are
// float32 numbers, and of 16-bit numbers there are none. Squares that underflow are off by less than 2^-148, which does
// not count beside kLeast. If the sum is less or overflows, float64 decides.
template <class T>
__device__ double squared_norm(const T* sample, std::int64_t dim) {
  if constexpr (!std::is_same_v<T, double>) {
    constexpr float kLeast = 0x1p-80f, kMost = std::numeric_limits<float>::max();
    CompensatedSum<float> sum;
    for (std::int64_t k = threadIdx.x % 32; k < dim; k += 32) {
      const float element = widen(sample[k]), square = __fmul_rn(element, element);
      sum += square;
      if constexpr (std::is_same_v<T, float>) sum.low = __fadd_rn(sum.low, __fmaf_rn(element, element, -square));
    }
    sum = sum.of_warp();
    const float size = __shfl_sync(0xffffffffu, sum.high, 0);
    if (size >= kLeast && size <= kMost) return static_cast<double>(sum);
  }
  return squared_norm_in_float64(sample, dim);
}

}  // namespace icsd::cuda
