// __half: arithmetic goes through float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vector_types.h"

struct __half {
  std::uint16_t bits;

  __half() = default;
  __half(float value) {
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    const std::uint32_t sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
    if (magnitude > 0x7f800000) {
      bits = 0x7fff;
    } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
      bits = sign | 0x7c00;
    } else if (magnitude < 0x38800000) {  // subnormal: a multiple of 2⁻²⁴
      bits = sign | static_cast<std::uint16_t>(std::nearbyint(std::fabs(value) * 0x1p24f));
    } else {
      bits = sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
  }
  operator float() const {
    const float sign = bits & 0x8000 ? -1 : 1;
    const int exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(1.0f * fraction, -24));
  }
};
struct alignas(4) __half2 {
  __half x, y;
};
using half = __half;
using half2 = __half2;

inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 pair) { return {pair.x, pair.y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }
inline float __low2float(__half2 pair) { return pair.x; }
inline float __high2float(__half2 pair) { return pair.y; }
