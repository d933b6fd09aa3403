// Packed panels: features converted to the type that is multiplied, padded to whole vectors and next to each other in
// the cache, to be used many times. Unpacked, rows a power of two apart would evict each other from the cache, and
// 16-bit types would be converted at every use.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

constexpr int64_t kLine = 64;               // bytes of a cache line
constexpr int64_t kPanelBytes = 256 << 10;  // of a panel, to stay in the second-level cache

[[maybe_unused]] int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Returns the features of a panel of `samples` rows: whole units, so many that loops are long and the panel stays
// cached.
[[maybe_unused]] int64_t panel_width(int64_t samples, int64_t element_bytes, int64_t unit, int64_t least,
                                     int64_t most) {
  const int64_t fits = kPanelBytes / (element_bytes * std::max<int64_t>(samples, 1));
  return round_up(std::clamp(fits, least, most), unit);
}

// Returns a panel of this thread, which is kept for the next call. `slot` is for kernels with two. It is on a large
// page: small pages would fall on random sets of the cache, too many of them on some sets.
template <class C>
C* panel(int slot, int64_t elements) {
  thread_local Allocation slots[2] = {Allocation(0), Allocation(0)};
  const std::size_t bytes = elements * sizeof(C);
  if (slots[slot].bytes() < bytes) slots[slot] = Allocation(std::max(bytes, kLargeBytes));
  return static_cast<C*>(slots[slot].data());
}

constexpr int64_t kInPlaceSamples = 16;  // so few rows are used too rarely to be worth packing

// Copies `width` elements as P, then zeros up to a whole vector.
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

// Fetches a (rows x bytes) rectangle into the second-level cache, evenly over `steps` calls of `step`: single lines
// arrive while the processor multiplies, for a burst it would have to wait. A few rows are fetched side by side, so
// that their pages are looked up at the same time.
class Prefetch {
 public:
  Prefetch(const void* data, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t steps)
      : line_(static_cast<const char*>(data)),
        row_bytes_(row_bytes),
        rows_(rows),
        bytes_(bytes),
        left_(rows * ((bytes + kLine - 1) / kLine)),
        lines_((left_ + steps - 1) / std::max<int64_t>(steps, 1)) {}

  Prefetch(const Ahead::Rectangle& of, int64_t steps) : Prefetch(of.data, of.row_bytes, of.rows, of.bytes, steps) {}

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

  const char* line_;              // of the first of the rows that are fetched side by side
  int64_t row_bytes_, rows_;      // rows from that one on
  int64_t bytes_, left_, lines_;  // bytes of a row; lines that are left; lines of a step
  int64_t row_ = 0, byte_ = 0;
};

}  // namespace
}  // namespace icsd::cpu::ICSD_ISA
