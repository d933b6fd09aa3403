// Element types of the features. Everything is accumulated in `Compute<T>`.
#pragma once

#include <cstddef>
#include <cstdint>

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

constexpr std::size_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

}  // namespace icsd
