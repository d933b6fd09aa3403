// Compiled once for each instruction set, with ICSD_ISA its namespace.
//
// Both passes copy a panel of features, in compute type and padded to whole vectors, next to each other into the cache
// before they use it many times: rows a power of two apart would evict each other, and half types convert once.
#include "cpu/kernels.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cpu/simd.h"

#define ICSD_STRING_(x) #x
#define ICSD_STRING(x) ICSD_STRING_(x)

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// Register tiles: Gram kTileRows x kTileColumns sums; combine up to kOutputs outputs x kColumns vectors.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileColumns = 4, kOutputs = 6, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 3, kTileColumns = 3, kOutputs = 6, kColumns = 2;
#else
constexpr int kTileRows = 3, kTileColumns = 3, kOutputs = 4, kColumns = 2;
#endif

constexpr int64_t kLine = 64;                   // bytes of a cache line
constexpr int64_t kPanelBytes = 256 << 10;      // of a panel, to stay in the second-level cache
constexpr int64_t kInPlaceSamples = 16;         // this many rows need no panel: each has its way of the cache
constexpr int64_t kStreamBytes = int64_t{16} << 20;  // results above this go past the cache

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Features of a panel over `samples` rows: whole units, within bounds that keep the loops long and the panel cached.
int64_t panel_width(int64_t samples, int64_t element_bytes, int64_t unit, int64_t least, int64_t most) {
  const int64_t fits = kPanelBytes / (element_bytes * std::max<int64_t>(samples, 1));
  return round_up(std::clamp(fits, least, most), unit);
}

// A thread's panel, kept from call to call; `slot` tells two of one kernel apart.
template <class C>
C* panel(int slot, int64_t elements) {
  struct Buffer {
    std::unique_ptr<char[]> bytes;
    std::size_t size = 0;
  };
  thread_local Buffer buffers[2];
  Buffer& buffer = buffers[slot];
  const std::size_t size = elements * sizeof(C) + kLine;
  if (buffer.size < size) {
    buffer.bytes.reset(new char[size]);
    buffer.size = size;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(buffer.bytes.get());
  return reinterpret_cast<C*>((address + kLine - 1) / kLine * kLine);
}

// `width` elements in compute type, then zeros up to a whole vector.
template <class T>
void copy_row(const T* from, int64_t width, Compute<T>* to) {
  constexpr int kStep = kLanes<Compute<T>>;
  int64_t k = 0;
  for (; k + kStep <= width; k += kStep) store(to + k, load(from + k));
  if (k < width) store(to + k, load_partial(from + k, width - k));
}

// Fetches a (rows x bytes) rectangle into the second-level cache in `parts` equal parts, one for each call of `next`.
class Prefetch {
 public:
  Prefetch(const void* data, int64_t row_bytes, int64_t rows, int64_t bytes, int64_t parts)
      : row_(static_cast<const char*>(data)),
        row_bytes_(row_bytes),
        bytes_(bytes),
        left_(rows * ((bytes + kLine - 1) / kLine)),
        part_(left_ / std::max<int64_t>(parts, 1) + 1) {}

  void next() {
    const int64_t count = std::min(left_, part_);
    for (int64_t line = 0; line < count; ++line) {
      __builtin_prefetch(row_ + byte_, 0, 2);
      byte_ += kLine;
      if (byte_ >= bytes_) {
        byte_ = 0;
        row_ += row_bytes_;
      }
    }
    left_ -= count;
  }

 private:
  const char* row_;
  int64_t row_bytes_, bytes_, left_, part_;
  int64_t byte_ = 0;
};

// The products of I rows of `a` and J rows of `b`, whole vectors of them: gram[r][c] += <a_r, b_c>.
template <class C, int I, int J>
void gram_tile(const C* a, int64_t a_stride, const C* b, int64_t b_stride, int64_t width, double* gram,
               int64_t gram_stride) {
  Vector<C> sums[I][J];
  for (int r = 0; r < I; ++r) {
    for (int c = 0; c < J; ++c) sums[r][c] = Vector<C>{};
  }
  for (int64_t k = 0; k < width; k += kLanes<C>) {
    Vector<C> left[I];
    for (int r = 0; r < I; ++r) left[r] = load(a + r * a_stride + k);
    for (int c = 0; c < J; ++c) {
      const Vector<C> right = load(b + c * b_stride + k);
      for (int r = 0; r < I; ++r) sums[r][c] += left[r] * right;
    }
  }
  for (int r = 0; r < I; ++r) {
    for (int c = 0; c < J; ++c) gram[r * gram_stride + c] += sum(sums[r][c]);
  }
}

template <class C>
using GramTile = void (*)(const C*, int64_t, const C*, int64_t, int64_t, double*, int64_t);

// gram_tile for each number of rows and columns that an edge can leave.
template <class C, int I, int J>
GramTile<C> gram_tile_of(int64_t rows, int64_t columns) {
  if (rows < I) {
    if constexpr (I > 1) return gram_tile_of<C, I - 1, J>(rows, columns);
  }
  if (columns < J) {
    if constexpr (J > 1) return gram_tile_of<C, I, J - 1>(rows, columns);
  }
  return gram_tile<C, I, J>;
}

template <class T>
void gram(const void* data, int64_t stride, int64_t features, GramBlock block, double* out, int64_t out_stride) {
  using C = Compute<T>;
  constexpr int kStep = kLanes<C>;
  const int64_t rows = block.row_end - block.row_begin, columns = block.column_end - block.column_begin;
  const bool on_diagonal = block.row_begin == block.column_begin;
  const int64_t samples = on_diagonal ? std::max(rows, columns) : rows + columns;
  const int64_t width = std::min(panel_width(samples, sizeof(C), kStep, 512, 4096), round_up(features, kStep));
  const int64_t panel_stride = width + kStep;  // not a power of two
  const T* x = static_cast<const T*>(data);

  struct Rows {
    const C* data;
    int64_t stride;
  };
  const auto prepare = [&](int64_t first, int64_t count, int64_t k, int64_t take, int slot) -> Rows {
    const T* from = x + first * stride + k;
    if constexpr (std::is_same_v<T, C>) {
      if (count <= kInPlaceSamples && take % kStep == 0) return {from, stride};
    }
    C* to = panel<C>(slot, count * panel_stride);
    for (int64_t i = 0; i < count; ++i) copy_row(from + i * stride, take, to + i * panel_stride);
    return {to, panel_stride};
  };

  const int64_t tiles = (rows + kTileRows - 1) / kTileRows * ((columns + kTileColumns - 1) / kTileColumns);
  for (int64_t k = 0; k < features; k += width) {
    const int64_t take = std::min(width, features - k), next = std::min(width, features - k - take);
    const Rows a = prepare(block.row_begin, on_diagonal ? samples : rows, k, take, 0);
    const Rows b = on_diagonal ? a : prepare(block.column_begin, columns, k, take, 1);
    Prefetch ahead(x + block.row_begin * stride + k + take, stride * sizeof(T), a.stride == stride ? 0 : rows,
                   next * sizeof(T), on_diagonal ? (tiles + 1) / 2 : tiles);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      for (int64_t j = 0; j < columns && (!on_diagonal || j < i + kTileRows); j += kTileColumns) {
        const int64_t height = std::min<int64_t>(kTileRows, rows - i), breadth = std::min<int64_t>(kTileColumns, columns - j);
        gram_tile_of<C, kTileRows, kTileColumns>(height, breadth)(
            a.data + i * a.stride, a.stride, b.data + j * b.stride, b.stride, round_up(take, kStep),
            out + i * out_stride + j, out_stride);
        ahead.next();
      }
    }
  }
}

// Outputs are shared out evenly over blocks of at most kOutputs, so that no block is nearly empty.
int64_t blocks_of(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }
int64_t block_start(int64_t block, int64_t outputs) { return block * outputs / blocks_of(outputs); }

template <class T, class C>
void pack(const C* matrix, int64_t row_stride, int64_t outputs, int64_t samples, void* packed) {
  auto* p = static_cast<Compute<T>*>(packed);
  for (int64_t block = 0; block < blocks_of(outputs); ++block) {
    const int64_t begin = block_start(block, outputs), end = block_start(block + 1, outputs);
    for (int64_t j = 0; j < samples; ++j) {
      for (int64_t i = begin; i < end; ++i) *p++ = static_cast<Compute<T>>(matrix[i * row_stride + j]);
    }
  }
}

// How the results of `combine` reach memory.
enum class Store { whole, streamed, partial };

// R outputs of kColumns vectors, of which `count` elements are stored, from rows of as many.
template <class T, int R, Store S>
void combine_tile(const Compute<T>* packed, const double* scale, const Compute<T>* x, int64_t x_stride, int64_t samples,
                  T* out, int64_t out_stride, int64_t count) {
  using C = Compute<T>;
  constexpr int kStep = kLanes<C>;
  Vector<C> sums[R][kColumns];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColumns; ++v) sums[r][v] = Vector<C>{};
  }
  for (int64_t j = 0; j < samples; ++j, packed += R, x += x_stride) {
    Vector<C> row[kColumns];
    for (int v = 0; v < kColumns; ++v) row[v] = load(x + v * kStep);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kColumns; ++v) sums[r][v] += packed[r] * row[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    const C factor = static_cast<C>(scale[r]);
    for (int v = 0; v < kColumns; ++v) {
      const Vector<C> value = sums[r][v] * factor;
      T* to = out + r * out_stride + v * kStep;
      if constexpr (S == Store::whole) {
        store(to, value);
      } else if constexpr (S == Store::streamed) {
        stream(to, value);
      } else {
        store_partial(to, value, std::clamp<int64_t>(count - v * kStep, 0, kStep));
      }
    }
  }
}

template <class T>
using CombineTile = void (*)(const Compute<T>*, const double*, const Compute<T>*, int64_t, int64_t, T*, int64_t, int64_t);

template <class T, Store S, int R = kOutputs>
CombineTile<T> combine_tile_of(int64_t outputs) {
  if (outputs < R) {
    if constexpr (R > 1) return combine_tile_of<T, S, R - 1>(outputs);
  }
  return combine_tile<T, R, S>;
}

// Whether every row begins on a whole vector, so that results may go past the cache.
template <class T>
bool streams(const T* out, int64_t out_stride, int64_t outputs, int64_t features) {
  if constexpr (kStreams<T>) {
    return reinterpret_cast<std::uintptr_t>(out) % ICSD_VECTOR_BYTES == 0 &&
           out_stride * static_cast<int64_t>(sizeof(T)) % ICSD_VECTOR_BYTES == 0 &&
           outputs * features * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  } else {
    return false;
  }
}

template <class T>
void combine(const void* packed, const double* scale, const void* data, int64_t stride, int64_t samples,
             int64_t features, void* result, int64_t out_stride, int64_t outputs) {
  using C = Compute<T>;
  constexpr int64_t kWidth = kLanes<C> * kColumns;
  const T* x = static_cast<const T*>(data);
  T* out = static_cast<T*>(result);
  const C* matrix = static_cast<const C*>(packed);
  const bool streamed = streams(out, out_stride, outputs, features);
  const int64_t width = panel_width(2 * samples, sizeof(C), kWidth, kWidth, 1024);
  const bool in_place = std::is_same_v<T, C> && samples <= kInPlaceSamples;
  C* const rows = panel<C>(0, samples * kWidth);
  for (int64_t k = 0; k < features; k += width) {
    const int64_t take = std::min(width, features - k), next = std::min(width, features - k - take);
    const int64_t strips = (take + kWidth - 1) / kWidth;
    Prefetch ahead(x + k + take, stride * sizeof(T), in_place ? 0 : samples, next * sizeof(T),
                   strips * blocks_of(outputs));
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t begin = strip * kWidth, count = std::min(kWidth, take - begin);
      const C* strip_rows = rows;
      int64_t strip_stride = kWidth;
      if (in_place && count == kWidth) {
        if constexpr (std::is_same_v<T, C>) strip_rows = x + k + begin;
        strip_stride = stride;
      } else {
        if (count < kWidth) std::fill_n(rows, samples * kWidth, C(0));
        for (int64_t j = 0; j < samples; ++j) copy_row(x + j * stride + k + begin, count, rows + j * kWidth);
      }
      for (int64_t block = 0; block < blocks_of(outputs); ++block) {
        const int64_t first = block_start(block, outputs), height = block_start(block + 1, outputs) - first;
        const auto tile = count < kWidth ? combine_tile_of<T, Store::partial>(height)
                          : streamed     ? combine_tile_of<T, kStreams<T> ? Store::streamed : Store::whole>(height)
                                         : combine_tile_of<T, Store::whole>(height);
        tile(matrix + first * samples, scale + first, strip_rows, strip_stride, samples,
             out + first * out_stride + k + begin, out_stride, count);
        ahead.next();
      }
    }
  }
  if (streamed) fence();
}

}  // namespace

extern const AllRowKernels<float> rows_float;
extern const AllRowKernels<double> rows_double;

const Kernels kernels = {
    ICSD_STRING(ICSD_ISA),
    {gram<float>, gram<double>, gram<bfloat16>, gram<float16>},
    {combine<float>, combine<double>, combine<bfloat16>, combine<float16>},
    {pack<float, float>, pack<double, float>, pack<bfloat16, float>, pack<float16, float>},
    {pack<float, double>, pack<double, double>, pack<bfloat16, double>, pack<float16, double>},
    &rows_float,
    &rows_double,
};

}  // namespace icsd::cpu::ICSD_ISA
