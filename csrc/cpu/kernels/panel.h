// Panels: features, converted to what is multiplied and padded to whole vectors, next to each other in the cache, to be
// used many times. Rows a power of two apart would evict each other, and half types convert once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/runtime/memory.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

constexpr int64_t kLine = 64;               // bytes of a cache line
constexpr int64_t kPanelBytes = 256 << 10;  // of a panel, to stay in the second-level cache

[[maybe_unused]] int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Features of a panel over `samples` rows: whole units, within bounds that keep the loops long and the panel cached.
[[maybe_unused]] int64_t panel_width(int64_t samples, int64_t element_bytes, int64_t unit, int64_t least,
                                     int64_t most) {
  const int64_t fits = kPanelBytes / (element_bytes * std::max<int64_t>(samples, 1));
  return round_up(std::clamp(fits, least, most), unit);
}

// A thread's panel, kept from call to call; `slot` tells two of one kernel apart. On a large page: the small ones of
// which a panel would otherwise be made fall on whatever sets of the cache, on some too many.
template <class C>
C* panel(int slot, int64_t elements) {
  thread_local Allocation slots[2] = {Allocation(0), Allocation(0)};
  const std::size_t bytes = elements * sizeof(C);
  if (slots[slot].bytes() < bytes) slots[slot] = Allocation(std::max(bytes, kLargeBytes));
  return static_cast<C*>(slots[slot].data());
}

constexpr int64_t kInPlaceSamples = 16;  // so few rows are not read often enough for a panel to pay

// `width` elements as P, then zeros up to a whole vector.
template <class T, class P>
[[maybe_unused]] void copy_row(const T* from, int64_t width, P* to) {
  constexpr int kStep = kLanes<P>;
  int64_t k = 0;
  for (; k + kStep <= width; k += kStep) store(to + k, load_as<P>(from + k));
  if (k < width) store(to + k, load_partial<P>(from + k, width - k));
}

// A panel's rows, `stride` elements apart.
template <class P>
struct Rows {
  P* data;
  int64_t stride;

  Rows from(int64_t row) const { return {data + row * stride, stride}; }
};

// Fetches a (rows x bytes) rectangle into the second-level cache, evenly over `steps` calls of `step`: a burst would
// wait for memory where single lines arrive in the shadow of the multiplications. A few rows go side by side: their
// pages are looked up at the same time.
class Prefetch {
 public:
  Prefetch(const void* data, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps)
      : line_(static_cast<const char*>(data)),
        row_bytes_(row_bytes),
        rows_(rows),
        bytes_(bytes),
        left_(rows * ((bytes + kLine - 1) / kLine)),
        lines_((left_ + steps - 1) / std::max<int64_t>(steps, 1)) {}

  void step() {
    for (int64_t line = std::min(left_, lines_); line > 0; --line, --left_) {
      __builtin_prefetch(line_ + row_ * row_bytes_, 0, 2);
      if (++row_ < std::min(rows_, kTogether)) continue;
      row_ = 0;
      line_ += kLine;
      byte_ += kLine;
      if (byte_ >= bytes_) {
        line_ += kTogether * row_bytes_ - byte_;
        byte_ = 0;
        rows_ -= kTogether;
      }
    }
  }

 private:
  static constexpr int64_t kTogether = 8;

  const char* line_;              // of the first of the rows that go side by side
  int64_t row_bytes_, rows_;      // rows from that one on
  int64_t bytes_, left_, lines_;  // of a row; lines to come; lines of a step
  int64_t row_ = 0, byte_ = 0;
};

}  // namespace
}  // namespace icsd::cpu::ICSD_ISA
