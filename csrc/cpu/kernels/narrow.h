// Functions that the kernels for bfloat16 products share, with tile registers or without.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/runtime/simd.h"

#if defined(__AVX512BF16__)
namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// Interleaves the elements of two rows, into two vectors.
inline void interleave(Bfloat16Vector a, Bfloat16Vector b, Bfloat16Vector* to) {
  to[0] = __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42,
                                  11, 43, 12, 44, 13, 45, 14, 46, 15, 47);
  to[1] = __builtin_shufflevector(a, b, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57,
                                  26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}

// Interleaves pairs of samples, `vectors` of 16 features for each pair. Zeros follow the first `count` features and the
// last sample.
[[maybe_unused]] void interleave_pairs(const bfloat16* x, int64_t stride, int64_t samples, int64_t count,
                                       int64_t vectors, Bfloat16Vector* to) {
  constexpr int64_t kStep = kLanes<bfloat16>;
  for (int64_t sample = 0; sample < samples; sample += 2, x += 2 * stride, to += vectors) {
    const bfloat16* second = sample + 1 < samples ? x + stride : nullptr;
    for (int64_t step = 0; step < vectors / 2; ++step) {
      const int64_t some = std::clamp<int64_t>(count - step * kStep, 0, kStep);
      const auto read = [&](const bfloat16* row) {
        if (!row) return Bfloat16Vector{};
        return some == kStep ? load_as<bfloat16>(row + step * kStep) : load_partial<bfloat16>(row + step * kStep, some);
      };
      interleave(read(x), read(second), to + 2 * step);
    }
  }
}

// Stores up to a vector of an output: the sum of the products and the rest of the diagonal times the sample, scaled.
inline void finish(FloatVector sum, float rest, const bfloat16* own, float factor, bfloat16* to, int64_t count) {
  if (count == kLanes<float>) {
    store(to, (sum + rest * load(own)) * factor);
  } else {
    store_partial(to, (sum + rest * load_partial<float>(own, count)) * factor, count);
  }
}

}  // namespace
}  // namespace icsd::cpu::ICSD_ISA
#endif
