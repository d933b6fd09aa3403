// The arithmetic of the tensor cores.

#include <cmath>
#include <cstring>

#include "emulator.h"

namespace emulator {
namespace {

// The float next to `value` towards zero.
inline double truncated(double value) {
  std::uint64_t word;
  std::memcpy(&word, &value, sizeof word);
  word &= ~((std::uint64_t{1} << 29) - 1);
  double cut;
  std::memcpy(&cut, &word, sizeof cut);
  return std::isfinite(value) ? cut : value;
}

}  // namespace

// Products of the elements are exact in double, and so nearly is a sum of a few of them.
__attribute__((optimize("O3"), target_clones("avx512f", "avx2", "default"))) void tile_product(
    const double* a, const double* b, double* c, int rows, int columns, int depth, int group) {
  const int step = group ? group : depth;
  for (int i = 0; i < rows; ++i) {
    double* const row = c + i * columns;
    for (int begin = 0; begin < depth; begin += step) {
      for (int k = begin; k < begin + step; ++k) {
        const double factor = a[i * depth + k];
        for (int j = 0; j < columns; ++j) row[j] += factor * b[k * columns + j];
      }
      if (group) {
        for (int j = 0; j < columns; ++j) row[j] = truncated(row[j]);
      }
    }
  }
}

}  // namespace emulator
