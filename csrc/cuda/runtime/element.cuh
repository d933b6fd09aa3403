// Element types on the device and conversions to and from their compute types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "core/dtype.h"

namespace icsd::cuda {

inline __device__ float widen(float x) { return x; }
inline __device__ double widen(double x) { return x; }
inline __device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
inline __device__ float widen(__half x) { return __half2float(x); }

template <class T>
struct Narrow {
  template <class C>
  static __device__ T from(C x) {
    return static_cast<T>(x);
  }
};
template <>
struct Narrow<__nv_bfloat16> {
  static __device__ __nv_bfloat16 from(float x) { return __float2bfloat16_rn(x); }
};
template <>
struct Narrow<__half> {
  static __device__ __half from(float x) { return __float2half_rn(x); }
};

template <class T>
constexpr DType kDTypeOf = DType::float32;
template <>
inline constexpr DType kDTypeOf<double> = DType::float64;
template <>
inline constexpr DType kDTypeOf<__nv_bfloat16> = DType::bfloat16;
template <>
inline constexpr DType kDTypeOf<__half> = DType::float16;

// 16 bytes of elements, which one instruction loads or stores.
template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// Four 16-bit elements, which one instruction loads or stores.
template <class T>
struct alignas(8) HalfVector {
  T x[4];
};

// Calls call(T{}), where T is the element type of `dtype`.
template <class Call>
void with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::float32: return call(float{});
    case DType::float64: return call(double{});
    case DType::bfloat16: return call(__nv_bfloat16{});
    case DType::float16: return call(__half{});
  }
  throw std::invalid_argument("unknown dtype code");
}

}  // namespace icsd::cuda
