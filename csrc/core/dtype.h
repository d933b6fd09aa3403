// Element types of the features. Everything is accumulated in `Compute<T>`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/math.h"

namespace icsd {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
constexpr int kDTypes = 4;

struct bfloat16 {
  std::uint16_t bits;
};
struct float16 {
  std::uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// Rounds to nearest, ties to even. NaN loses its payload.
ICSD_HD bfloat16 to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7fc0};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
ICSD_HD float to_float(bfloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

constexpr std::size_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

}  // namespace icsd
