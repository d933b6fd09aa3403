// Matrix products in register tiles and the packing of their operands, for the regimes with many samples.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/runtime/memory.h"

namespace icsd::cpu {

// The samples of a block, and the terms that are summed in registers before a sum goes to memory. It is a multiple of
// the widths of all panels.
constexpr std::int64_t kBlock = 192;

// A packed operand. Its element (k, r), with r the row of a left or the column of a right one, is at
// data[r / width * panel_stride + k * step + r % width].
template <class C>
struct Panels {
  const C* data;
  std::int64_t width, step, panel_stride;

  Panels from(std::int64_t k, std::int64_t r) const {
    return {data + r / width * panel_stride + k * step + r % width, width, step, panel_stride};
  }
};

// The kernels of compute type C, for features of any type that C can hold. Samples are `stride` elements apart.
template <class C>
struct ProductKernels {
  // The width of the panels below. Results are written in whole tiles of up to `panel` columns and 8 rows.
  std::int64_t panel;

  // Computes the squared norms of the samples.
  using Squares = void (*)(const void* x, std::int64_t stride, std::int64_t samples, std::int64_t dim, C* squares);
  Squares squares[kDTypes];

  // Pack scale_i x_i, or x_i if scale is null: by_feature as panels of features, (k, r) = (sample, feature), by_sample
  // as panels of samples, (k, r) = (feature, sample). Zeros fill the last panel.
  using Pack = void (*)(const void* x, std::int64_t stride, std::int64_t samples, std::int64_t dim, const C* scale,
                        C* panels, std::int64_t panel_stride);
  Pack by_feature[kDTypes], by_sample[kDTypes];

  // Computes out_rc = Σ_k a_kr b_kc or adds it to `out`. The panels of `b` are `panel` wide.
  void (*multiply)(Panels<C> a, Panels<C> b, std::int64_t rows, std::int64_t columns, std::int64_t depth, C* out,
                   std::int64_t out_stride, bool add);

  // Transposes a matrix of kBlock x kBlock.
  void (*transpose)(const C* block, C* transposed);

  // Subtracts the mean of all samples from each. The differences to the first sample are made before: they are exact
  // where the mean is large, and 0 for equal samples.
  using Center = void (*)(const void* x, std::int64_t stride, std::int64_t samples, std::int64_t dim, C* out,
                          std::int64_t out_stride);
  Center center[kDTypes];

  // Computes out = factor r (h - <h, r x> r x), the gradient with respect to x from the gradient h with respect to r x.
  // Without `project`, r does not depend on x, and the second term is left out.
  using Finish = void (*)(const C* h, const void* x, std::int64_t dim, C r, bool project, C factor, void* out);
  Finish finish[kDTypes];
};

}  // namespace icsd::cpu
