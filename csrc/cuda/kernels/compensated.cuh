// Sums about twice as precise as their type. Those of float32 are nearly as accurate as float64, for devices whose
// float64 units are slow.
#pragma once

#include <cuda_runtime.h>

namespace icsd::cuda {

// Additions that are not contracted to fused multiply-adds.
inline __device__ float rounded_sum(float x, float y) { return __fadd_rn(x, y); }
inline __device__ double rounded_sum(double x, double y) { return __dadd_rn(x, y); }

// A sum and the sum of the errors of its additions. Of n numbers, it is off by at most (n u)^2 times the sum of their
// absolute values, u = 2^-24 in float32, besides the rounding of the result: each error is at most u times that, and
// only the sum of the errors is rounded, n times.
template <class F>
struct CompensatedSum {
  F high = 0, low = 0;

  __device__ CompensatedSum& operator+=(F x) {
    const F sum = rounded_sum(high, x), part = rounded_sum(sum, -high);
    // F represents the error of an addition, whichever number is larger (Knuth).
    const F error = rounded_sum(rounded_sum(high, -rounded_sum(sum, -part)), rounded_sum(x, -part));
    high = sum;
    low = rounded_sum(low, error);
    return *this;
  }
  __device__ CompensatedSum& operator+=(const CompensatedSum& other) {
    *this += other.high;
    low = rounded_sum(low, other.low);
    return *this;
  }

  // Returns the sum over the lanes of the warp in the first lane.
  __device__ CompensatedSum of_warp() const {
    CompensatedSum sum = *this;
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      CompensatedSum other;
      other.high = __shfl_down_sync(0xffffffffu, sum.high, lanes);
      other.low = __shfl_down_sync(0xffffffffu, sum.low, lanes);
      sum += other;
    }
    return sum;
  }

  __device__ explicit operator float() const { return static_cast<float>(high + low); }
  __device__ explicit operator double() const { return static_cast<double>(high) + low; }
};

}  // namespace icsd::cuda
