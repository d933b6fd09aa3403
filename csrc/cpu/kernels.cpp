// Compiled once for each instruction set, with ICSD_ISA its namespace.
//
// Both passes copy a panel of features, converted to what is multiplied and padded to whole vectors, next to each other
// into the cache before they use it many times: rows a power of two apart would evict each other, and half types convert
// once.
#include "cpu/kernels.h"

#include <algorithm>
#include <cstdint>

#include "cpu/narrow.h"
#include "cpu/panel.h"
#include "cpu/simd.h"

#define ICSD_STRING_(x) #x
#define ICSD_STRING(x) ICSD_STRING_(x)

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// Register tiles: Gram kTile x kTile sums; combine up to kOutputs outputs x kColumns vectors.
#if defined(__AVX512F__)
constexpr int kTile = 4, kOutputs = 6, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kTile = 3, kOutputs = 6, kColumns = 2;
#else
constexpr int kTile = 3, kOutputs = 4, kColumns = 2;
#endif

constexpr int64_t kLeastBytes = 2 << 10, kMostBytes = 16 << 10;  // of a row of a panel of `gram`
constexpr int64_t kInPlaceSamples = 16;  // so few rows are not read often enough for a panel to pay
// Results above so many bytes go past the cache, which saves reading their lines, where few samples leave the processor
// waiting for memory; otherwise the lines are fetched in the shadow of the multiplications.
constexpr int64_t kStreamBytes = int64_t{16} << 20, kStreamSamples = 16;

// `width` elements as P, then zeros up to a whole vector.
template <class T, class P>
void copy_row(const T* from, int64_t width, P* to) {
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

// The products of I rows of `a` and J rows of `b`, whole vectors of them, as far apart as each other: gram[r][c] += <a_r, b_c>.
// With kFill, the rows of `a` are read from `source` and left in the panel for the tiles to come, in the shadow of the
// multiplications. With kDiagonal, `b` is `a`, and one triangle is enough.
template <class T, int I, int J, bool kFill, bool kDiagonal>
void gram_tile(Rows<Operand<T>> a, Rows<Operand<T>> b, Rows<const T> source, int64_t width, Prefetch& next, double* gram,
               int64_t gram_stride) {
  using C = Compute<T>;
  using P = Operand<T>;
  constexpr int kStep = kLanes<P>;
  Prefetch ahead = next;  // in registers
  Vector<C> sums[I * J];
#pragma GCC unroll 32
  for (int i = 0; i < I * J; ++i) sums[i] = Vector<C>{};  // in registers too
  const P* const end = a.data + width;
  do {
    // Three pointers and their strides fit into the registers that are left, a pointer for each row does not.
    asm("" : "+r"(a.data), "+r"(b.data), "+r"(source.data));
    Vector<P> left[I];
    for (int r = 0; r < I; ++r) {
      if constexpr (kFill) {
        left[r] = load_as<P>(source.data + r * source.stride);
        store(a.data + r * a.stride, left[r]);
      } else {
        left[r] = load_as<P>(a.data + r * a.stride);
      }
    }
    for (int c = 0; c < J; ++c) {
      const Vector<P> right = kDiagonal ? left[c] : load_as<P>(b.data + c * a.stride);
      for (int r = kDiagonal ? c : 0; r < I; ++r) sums[r * J + c] = multiply_add(left[r], right, sums[r * J + c]);
    }
    ahead.step();
    a.data += kStep;
    b.data += kStep;
    source.data += kStep;
  } while (a.data < end);
  next = ahead;
  C totals[I * J];
  sum_each(sums, totals);
  for (int r = 0; r < I; ++r) {
    for (int c = 0; c < J; ++c) gram[r * gram_stride + c] += totals[r * J + c];
  }
}

template <class T>
using GramTile = void (*)(Rows<Operand<T>>, Rows<Operand<T>>, Rows<const T>, int64_t, Prefetch&, double*, int64_t);

// gram_tile for each number of rows and columns that an edge can leave.
template <class T, bool kFill, int I = kTile, int J = kTile>
GramTile<T> gram_tile_of(int64_t rows, int64_t columns, bool diagonal) {
  if (rows < I) {
    if constexpr (I > 1) return gram_tile_of<T, kFill, I - 1, J>(rows, columns, diagonal);
  }
  if (columns < J) {
    if constexpr (J > 1) return gram_tile_of<T, kFill, I, J - 1>(rows, columns, diagonal);
  }
  if constexpr (I == J) {
    if (diagonal) return gram_tile<T, I, J, kFill, true>;
  }
  return gram_tile<T, I, J, kFill, false>;
}

template <class T>
void gram(const void* data, int64_t stride, int64_t features, GramBlock block, double* out, int64_t out_stride) {
  using P = Operand<T>;
  constexpr int kStep = kLanes<P>;
  const int64_t rows = block.row_end - block.row_begin, columns = block.column_end - block.column_begin;
  const bool on_diagonal = block.row_begin == block.column_begin;
  const int64_t samples = on_diagonal ? rows : rows + columns;
  const int64_t width =
      std::min(panel_width(samples, sizeof(P), kStep, kLeastBytes / sizeof(P), kMostBytes / sizeof(P)),
               round_up(features, kStep));
  const int64_t panel_stride = width + kStep;  // not a power of two
  const Rows<P> panel_rows{panel<P>(0, samples * panel_stride), panel_stride};
  const T* x = static_cast<const T*>(data);

  const int64_t tiles = (rows + kTile - 1) / kTile * ((columns + kTile - 1) / kTile);
  for (int64_t k = 0; k < features; k += width) {
    const int64_t take = std::min(width, features - k), next = std::min(width, features - k - take);
    const auto fill = [&](Rows<P> to, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) copy_row(x + (first + i) * stride + k, take, to.from(i).data);
    };
    const bool whole = take % kStep == 0;
    Rows<P> a = panel_rows, b = a;
    bool in_place = false;
    if constexpr (std::is_same_v<P, T>) {
      in_place = on_diagonal && whole && rows <= kInPlaceSamples;
      if (in_place) a = b = {const_cast<T*>(x) + block.row_begin * stride + k, stride};
    }
    if (!on_diagonal) fill(b = a.from(rows), block.column_begin, columns);
    if (!whole) fill(a, block.row_begin, rows);
    Prefetch ahead(x + block.row_begin * stride + k + take, stride * sizeof(T), rows, next * sizeof(T),
                   (on_diagonal ? (tiles + 1) / 2 : tiles) * (width / kStep));
    for (int64_t i = 0; i < rows; i += kTile) {
      const Rows<const T> source{x + (block.row_begin + i) * stride + k, stride};
      const int64_t last = on_diagonal ? i : (columns - 1) / kTile * kTile;
      for (int64_t j = last; j >= 0; j -= kTile) {  // the tile on the diagonal first: it has fewest products, and fills
        const int64_t height = std::min<int64_t>(kTile, rows - i), breadth = std::min<int64_t>(kTile, columns - j);
        const bool filling = whole && !in_place && j == last, diagonal = on_diagonal && j == i;
        const auto tile = filling ? gram_tile_of<T, true>(height, breadth, diagonal)
                                  : gram_tile_of<T, false>(height, breadth, diagonal);
        tile(a.from(i), b.from(j), source, round_up(take, kStep), ahead, out + i * out_stride + j, out_stride);
      }
    }
  }
}

// Outputs are shared out evenly over blocks of at most kOutputs, so that no block is nearly empty.
int64_t blocks_of(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }
int64_t block_start(int64_t block, int64_t outputs) { return block * outputs / blocks_of(outputs); }

// By way of a few whole cache lines of each row: rows far apart share few sets of the cache, which would hold no more of
// them than that.
template <class T, class C>
void pack(const C* matrix, int64_t row_stride, int64_t outputs, int64_t samples, int64_t part, int64_t parts, void* packed) {
  constexpr int64_t kColumnsOfMatrix = kLine / sizeof(C);
  C lines[kOutputs][kColumnsOfMatrix];
  const int64_t blocks = blocks_of(outputs);
  for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
    const int64_t begin = block_start(block, outputs), height = block_start(block + 1, outputs) - begin;
    auto* to = static_cast<Compute<T>*>(packed) + begin * samples;
    for (int64_t j = 0; j < samples; j += kColumnsOfMatrix) {
      const int64_t count = std::min(kColumnsOfMatrix, samples - j);
      for (int64_t i = 0; i < height; ++i) std::copy_n(matrix + (begin + i) * row_stride + j, count, lines[i]);
      for (int64_t k = 0; k < count; ++k) {
        for (int64_t i = 0; i < height; ++i) *to++ = static_cast<Compute<T>>(lines[i][k]);
      }
    }
  }
}

// How the results of `combine` reach memory.
enum class Store { whole, streamed, partial };

// R outputs of kColumns vectors, of which `count` elements are stored, from rows of as many. With kFill, the rows are read
// from `source` and left in `x` for the tiles to come.
template <class T, int R, Store S, bool kFill>
void combine_tile(const Compute<T>* packed, const double* scale, Rows<Compute<T>> x, Rows<const T> source, int64_t samples,
                  Prefetch& next, T* out, int64_t out_stride, int64_t count) {
  using C = Compute<T>;
  Prefetch ahead = next;  // in registers
  constexpr int kStep = kLanes<C>;
  Vector<C> sums[R][kColumns];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColumns; ++v) {
      sums[r][v] = Vector<C>{};
      if constexpr (S == Store::whole) __builtin_prefetch(out + r * out_stride + v * kStep, 1, 2);
    }
  }
  for (int64_t j = 0; j < samples; ++j, packed += R, x.data += x.stride, source.data += source.stride) {
    Vector<C> row[kColumns];
    for (int v = 0; v < kColumns; ++v) {
      if constexpr (kFill) {
        row[v] = load(source.data + v * kStep);
        store(x.data + v * kStep, row[v]);
      } else {
        row[v] = load(x.data + v * kStep);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kColumns; ++v) sums[r][v] += packed[r] * row[v];
    }
    ahead.step();
  }
  next = ahead;
#pragma GCC unroll 8
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
using CombineTile = void (*)(const Compute<T>*, const double*, Rows<Compute<T>>, Rows<const T>, int64_t, Prefetch&, T*,
                             int64_t, int64_t);

template <class T, Store S, bool kFill, int R = kOutputs>
CombineTile<T> combine_tile_of(int64_t outputs) {
  if (outputs < R) {
    if constexpr (R > 1) return combine_tile_of<T, S, kFill, R - 1>(outputs);
  }
  return combine_tile<T, R, S, kFill>;
}

// Whether every row begins on a whole vector, so that results may go past the cache.
template <class T>
bool streams(const T* out, int64_t out_stride, int64_t outputs, int64_t features) {
  if constexpr (kStreams<T>) {
    return reinterpret_cast<std::uintptr_t>(out) % ICSD_VECTOR_BYTES == 0 &&
           out_stride * static_cast<int64_t>(sizeof(T)) % ICSD_VECTOR_BYTES == 0 &&
           outputs <= kStreamSamples && outputs * features * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
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
  const int64_t width = panel_width(2 * samples, sizeof(C), kWidth, kWidth, 512);
  const bool in_place = std::is_same_v<T, C> && samples <= kInPlaceSamples;
  const Rows<C> strip_rows{panel<C>(0, samples * kWidth), kWidth};
  for (int64_t k = 0; k < features; k += width) {
    const int64_t take = std::min(width, features - k), next = std::min(width, features - k - take);
    const int64_t strips = (take + kWidth - 1) / kWidth;
    Prefetch ahead(x + k + take, stride * sizeof(T), samples, next * sizeof(T),
                   strips * blocks_of(outputs) * samples);
    for (int64_t strip = 0; strip < strips; ++strip) {
      const int64_t begin = k + strip * kWidth, count = std::min(kWidth, k + take - begin);
      const bool whole = count == kWidth;
      const Rows<const T> source{x + begin, stride};
      Rows<C> rows = strip_rows;
      if (!whole) {
        std::fill_n(rows.data, samples * kWidth, C(0));
        for (int64_t j = 0; j < samples; ++j) copy_row(source.from(j).data, count, rows.from(j).data);
      } else if constexpr (std::is_same_v<T, C>) {
        if (in_place) rows = {const_cast<T*>(source.data), stride};
      }
      for (int64_t block = 0; block < blocks_of(outputs); ++block) {
        const int64_t first = block_start(block, outputs), height = block_start(block + 1, outputs) - first;
        const bool filling = whole && !in_place && block == 0;
        constexpr Store kStreamed = kStreams<T> ? Store::streamed : Store::whole;
        const auto tile = !whole     ? combine_tile_of<T, Store::partial, false>(height)
                          : filling  ? combine_tile_of<T, Store::whole, true>(height)
                          : streamed ? combine_tile_of<T, kStreamed, false>(height)
                                     : combine_tile_of<T, Store::whole, false>(height);
        tile(matrix + first * samples, scale + first, rows, source, samples, ahead, out + first * out_stride + begin,
             out_stride, count);
      }
    }
  }
  if (streamed) fence();
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// Pairs of samples lie interleaved in the panel and in the matrix: each instruction adds two of a sum's products.
int64_t narrow_bytes(int64_t samples) { return samples * ((samples + 1) / 2) * sizeof(std::uint32_t); }

bool pack_narrow(const float* matrix, int64_t row_stride, int64_t samples, void* data, float* rest) {
  auto* packed = static_cast<std::uint32_t*>(data);
  for (int64_t block = 0; block < blocks_of(samples); ++block) {
    const int64_t begin = block_start(block, samples), end = block_start(block + 1, samples);
    for (int64_t j = 0; j < samples; j += 2) {
      for (int64_t i = begin; i < end; ++i) {
        std::uint32_t pair = 0;
        for (int64_t k = j; k < std::min(j + 2, samples); ++k) {
          const float value = matrix[i * row_stride + k];
          const bfloat16 narrow = to_bfloat16(value);
          if (i == k) {
            rest[i] = value - to_float(narrow);
          } else if (to_float(narrow) != value) {
            return false;
          }
          pair |= static_cast<std::uint32_t>(narrow.bits) << (16 * (k - j));
        }
        *packed++ = pair;
      }
    }
  }
  return true;
}

// R outputs of kColumns vectors; `x` are the rows of the same samples.
template <int R, Store S>
void narrow_tile(const std::uint32_t* packed, const float* rest, const double* scale, const Bfloat16Vector* pairs,
                 int64_t samples, const bfloat16* x, int64_t x_stride, Prefetch& next, bfloat16* out, int64_t out_stride,
                 int64_t count) {
  constexpr int kStep = kLanes<float>;
  Prefetch ahead = next;  // in registers
  FloatVector sums[R][kColumns];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kColumns; ++v) {
      sums[r][v] = FloatVector{};
      if constexpr (S == Store::whole) __builtin_prefetch(out + r * out_stride + v * kStep, 1, 2);
    }
  }
  for (int64_t j = 0; j < samples; j += 2, packed += R, pairs += kColumns) {
    for (int r = 0; r < R; ++r) {
      const auto factors = reinterpret_cast<Bfloat16Vector>(UintVector{} + packed[r]);
      for (int v = 0; v < kColumns; ++v) sums[r][v] = multiply_add(factors, pairs[v], sums[r][v]);
    }
    ahead.step();
  }
  next = ahead;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float factor = static_cast<float>(scale[r]);
    for (int v = 0; v < kColumns; ++v) {
      const bfloat16* own = x + r * x_stride + v * kStep;
      bfloat16* to = out + r * out_stride + v * kStep;
      const int64_t some = S == Store::partial ? std::clamp<int64_t>(count - v * kStep, 0, kStep) : kStep;
      finish(sums[r][v], rest[r], own, factor, to, some);
    }
  }
}

using NarrowTile = void (*)(const std::uint32_t*, const float*, const double*, const Bfloat16Vector*, int64_t,
                            const bfloat16*, int64_t, Prefetch&, bfloat16*, int64_t, int64_t);

template <Store S, int R = kOutputs>
NarrowTile narrow_tile_of(int64_t outputs) {
  if (outputs < R) {
    if constexpr (R > 1) return narrow_tile_of<S, R - 1>(outputs);
  }
  return narrow_tile<R, S>;
}

void combine_narrow(const void* data, const float* rest, const double* scale, const bfloat16* x,
                    int64_t stride, int64_t samples, int64_t features, bfloat16* out, int64_t out_stride) {
  constexpr int64_t kWidth = kLanes<float> * kColumns;
  const int64_t pairs = (samples + 1) / 2;
  const auto* packed = static_cast<const std::uint32_t*>(data);
  auto* const rows = reinterpret_cast<Bfloat16Vector*>(panel<bfloat16>(0, 2 * pairs * kWidth));
  for (int64_t k = 0; k < features; k += kWidth) {
    const int64_t count = std::min(kWidth, features - k);
    Prefetch ahead(x + k + kWidth, stride * sizeof(bfloat16), k + kWidth < features ? samples : 0,
                   std::min(kWidth, features - k - kWidth) * sizeof(bfloat16), blocks_of(samples) * pairs);
    interleave_pairs(x + k, stride, samples, count, kColumns, rows);
    for (int64_t block = 0; block < blocks_of(samples); ++block) {
      const int64_t begin = block_start(block, samples), height = block_start(block + 1, samples) - begin;
      const auto tile = count < kWidth ? narrow_tile_of<Store::partial>(height) : narrow_tile_of<Store::whole>(height);
      tile(packed + begin * pairs, rest + begin, scale + begin, rows, samples, x + begin * stride + k, stride, ahead,
           out + begin * out_stride + k, out_stride, count);
    }
  }
}

constexpr NarrowKernels narrow_kernels = {narrow_bytes, pack_narrow, combine_narrow};
#endif

}  // namespace

extern const AllRowKernels<float> rows_float;
extern const AllRowKernels<double> rows_double;
extern const TileKernels<float> tiles_float;
extern const TileKernels<double> tiles_double;
#if defined(__AMX_BF16__)
extern const NarrowKernels narrow_kernels;
void gram_tiles(const void*, int64_t, int64_t, GramBlock, double*, int64_t);
#endif

const Kernels kernels = {
    ICSD_STRING(ICSD_ISA),
#if defined(__AMX_BF16__)
    {gram<float>, gram<double>, gram_tiles, gram<float16>},
#else
    {gram<float>, gram<double>, gram<bfloat16>, gram<float16>},
#endif
    {combine<float>, combine<double>, combine<bfloat16>, combine<float16>},
    {pack<float, float>, pack<double, float>, pack<bfloat16, float>, pack<float16, float>},
    {pack<float, double>, pack<double, double>, pack<bfloat16, double>, pack<float16, double>},
    &rows_float,
    &rows_double,
    &tiles_float,
    &tiles_double,
#if defined(__AVX512BF16__)
    &narrow_kernels,
#else
    nullptr,
#endif
};

}  // namespace icsd::cpu::ICSD_ISA
