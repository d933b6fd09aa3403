// A batch of features in memory, in the form that every native backend takes.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace icsd {

// A tensor (groups, samples, dim). The features of a sample are adjacent; strides are in elements.
struct Features {
  void* data;
  DType dtype;
  std::int64_t dim, group_stride, sample_stride;
};

struct Shape {
  std::int64_t groups, samples;
};

// Returns the number of elements from the first to the last one, inclusive.
inline std::int64_t extent(const Features& x, Shape shape) {
  if (!shape.groups || !shape.samples || !x.dim) return 0;
  return (shape.groups - 1) * x.group_stride + (shape.samples - 1) * x.sample_stride + x.dim;
}

}  // namespace icsd
