// Matrix products in register tiles, and what lays features out for them: the work of the regimes with many samples.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/runtime/memory.h"

namespace icsd::cpu {

// Samples of a block, and terms of a sum between two stops in memory. A multiple of all panels' widths.
constexpr std::int64_t kBlock = 192;

// A matrix operand: element (k, r), r the row of the left or the column of the right one, stands at
// data[r / width * panel_stride + k * step + r % width].
template <class C>
struct Panels {
  const C* data;
  std::int64_t width, step, panel_stride;

  Panels from(std::int64_t k, std::int64_t r) const {
    return {data + r / width * panel_stride + k * step + r % width, width, step, panel_stride};
  }
};

// Compute type C; features of any type that C holds, samples `stride` elements apart.
template <class C>
struct ProductKernels {
  // Width of the panels below; results are written in whole tiles: up to `panel` columns and 8 rows.
  std::int64_t panel;

  // Squared norms of the samples.
  using Squares = void (*)(const void* x, std::int64_t stride, std::int64_t samples, std::int64_t dim, C* squares);
  Squares squares[kDTypes];

  // scale_i x_i, or x_i if it is null, as panels of features, (k, r) = (sample, feature), or of samples, (k, r) =
  // (feature, sample); zeros fill the last panel.
  using Pack = void (*)(const void* x, std::int64_t stride, std::int64_t samples, std::int64_t dim, const C* scale,
                        C* panels, std::int64_t panel_stride);
  Pack by_feature[kDTypes], by_sample[kDTypes];

  // out_rc = Σ_k a_kr b_kc, or added to it; the panels of `b` are `panel` wide.
  void (*multiply)(Panels<C> a, Panels<C> b, std::int64_t rows, std::int64_t columns, std::int64_t depth, C* out,
                   std::int64_t out_stride, bool add);

  // kBlock x kBlock.
  void (*transpose)(const C* block, C* transposed);

  // out = factor r (h - <h, r x> r x), a gradient with respect to x from that with respect to r x; without the second
  // term where r does not depend on x.
  using Finish = void (*)(const C* h, const void* x, std::int64_t dim, C r, bool project, C factor, void* out);
  Finish finish[kDTypes];
};

}  // namespace icsd::cpu
