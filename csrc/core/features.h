// Batches of features in memory, as every native backend is handed them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace icsd {

// (groups, samples, features), the features of a sample adjacent. Strides in elements.
struct Features {
  void* data;
  DType dtype;
  std::int64_t dim, group_stride, sample_stride;
};

struct Shape {
  std::int64_t groups, samples;
};

// Elements from the first to the last, inclusive.
inline std::int64_t extent(const Features& x, Shape shape) {
  if (!shape.groups || !shape.samples || !x.dim) return 0;
  return (shape.groups - 1) * x.group_stride + (shape.samples - 1) * x.sample_stride + x.dim;
}

}  // namespace icsd
