// Addresses and norms of samples.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/features.h"

namespace icsd::cpu {

inline char* at(const Features& x, std::int64_t group, std::int64_t sample, std::int64_t feature) {
  const std::int64_t element = group * x.group_stride + sample * x.sample_stride + feature;
  return static_cast<char*>(x.data) + element * static_cast<std::int64_t>(size_of(x.dtype));
}

// Returns 1 / max(sqrt(K_ii), eps), 0 for a zero row, NaN if the squared norm is not finite.
template <class C>
C inverse_norm(C square, double eps) {
  if (square == 0) return 0;
  if (!std::isfinite(square)) return std::numeric_limits<C>::quiet_NaN();
  return 1 / std::max(std::sqrt(square), static_cast<C>(eps));
}

// Tells whether eps replaces the norm, through which no gradient flows then.
template <class C>
bool is_clamped(C square, double eps) {
  return std::sqrt(square) < static_cast<C>(eps);
}

inline std::int64_t blocks_of(std::int64_t count, std::int64_t block) { return (count + block - 1) / block; }

}  // namespace icsd::cpu
