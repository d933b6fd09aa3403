// The kernels of combine.h: outputs of a small matrix times some features. Compiled once for each instruction set, with
// ICSD_ISA its namespace.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/narrow.h"
#include "cpu/kernels/panel.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// A register tile has up to kOutputs outputs x kColumns vectors.
#if defined(__AVX512F__)
constexpr int kOutputs = 6, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kOutputs = 6, kColumns = 2;
#else
constexpr int kOutputs = 4, kColumns = 2;
#endif

// Results of at least kStreamBytes of at most kStreamSamples samples are stored past the cache, which saves reading
// their lines: so few samples leave the processor waiting for memory. With more, the lines are fetched while it
// multiplies.
constexpr int64_t kStreamBytes = int64_t{16} << 20, kStreamSamples = 16;

// Outputs are shared out evenly over blocks of at most kOutputs, so that no block is nearly empty.
int64_t blocks_of(int64_t outputs) { return (outputs + kOutputs - 1) / kOutputs; }
int64_t block_start(int64_t block, int64_t outputs) { return block * outputs / blocks_of(outputs); }

constexpr int64_t kTogether = 16;  // columns of a matrix that are packed at a time

// Packs kTogether columns of R rows.
template <class T, class C, int R>
void pack_columns(const C* matrix, int64_t row_stride, Compute<T>* to) {
  C lines[R][kTogether];
  for (int r = 0; r < R; ++r) std::memcpy(lines[r], matrix + r * row_stride, sizeof lines[r]);
  for (int64_t k = 0; k < kTogether; ++k) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) *to++ = static_cast<Compute<T>>(lines[r][k]);
  }
}

template <class T, class C>
using PackColumns = void (*)(const C*, int64_t, Compute<T>*);

template <class T, class C, int R = kOutputs>
PackColumns<T, C> pack_columns_of(int64_t rows) {
  if (rows < R) {
    if constexpr (R > 1) return pack_columns_of<T, C, R - 1>(rows);
  }
  return pack_columns<T, C, R>;
}

// Copies whole cache lines of each row at a time: rows far apart share few sets of the cache, which hold no more of
// them at once.
template <class T, class C>
void pack(const C* matrix, int64_t row_stride, int64_t outputs, int64_t samples, int64_t part, int64_t parts,
          void* packed) {
  const int64_t blocks = blocks_of(outputs);
  for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
    const int64_t begin = block_start(block, outputs), height = block_start(block + 1, outputs) - begin;
    const C* rows = matrix + begin * row_stride;
    auto* to = static_cast<Compute<T>*>(packed) + begin * samples;
    const auto columns = pack_columns_of<T, C>(height);
    int64_t j = 0;
    for (; j + kTogether <= samples; j += kTogether) columns(rows + j, row_stride, to + j * height);
    for (to += j * height; j < samples; ++j) {
      for (int64_t i = 0; i < height; ++i) *to++ = static_cast<Compute<T>>(rows[i * row_stride + j]);
    }
  }
}

// The way in which results are stored: whole vectors, whole vectors past the cache, or a part of a vector.
enum class Store { whole, streamed, partial };

// Computes R outputs of kColumns vectors, of which `count` elements are stored. With kFill, the rows are read from
// `source` and left in `x` for the next tiles.
template <class T, int R, Store S, bool kFill>
void combine_tile(const Compute<T>* packed, const double* scale, Rows<Compute<T>> x, Rows<const T> source,
                  int64_t samples, Prefetch& next, T* out, int64_t out_stride, int64_t count) {
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

// Tells whether results are to be stored past the cache, for which every row must be aligned to a vector.
template <class T>
bool streams(const T* out, int64_t out_stride, int64_t outputs, int64_t dim) {
  if constexpr (kStreams<T>) {
    return reinterpret_cast<std::uintptr_t>(out) % ICSD_VECTOR_BYTES == 0 &&
           out_stride * static_cast<int64_t>(sizeof(T)) % ICSD_VECTOR_BYTES == 0 && outputs <= kStreamSamples &&
           outputs * dim * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
  } else {
    return false;
  }
}

template <class T>
void combine(const void* packed, const double* scale, const void* data, int64_t stride, int64_t samples, int64_t dim,
             void* result, int64_t out_stride, int64_t outputs, const Ahead& then) {
  using C = Compute<T>;
  constexpr int64_t kWidth = kLanes<C> * kColumns;
  const T* x = static_cast<const T*>(data);
  T* out = static_cast<T*>(result);
  const C* matrix = static_cast<const C*>(packed);
  const bool streamed = streams(out, out_stride, outputs, dim);
  const int64_t width = panel_width(2 * samples, sizeof(C), kWidth, kWidth, 512);
  const bool in_place = std::is_same_v<T, C> && samples <= kInPlaceSamples;
  const Rows<C> strip_rows{panel<C>(0, samples * kWidth), kWidth};
  for (int64_t k = 0; k < dim; k += width) {
    const int64_t take = std::min(width, dim - k), next = std::min(width, dim - k - take);
    const int64_t strips = (take + kWidth - 1) / kWidth;
    const int64_t tiles = strips * blocks_of(outputs), steps = tiles * samples;
    const bool last_panel = next == 0;
    Prefetch ahead[] = {{x + k + take, static_cast<int64_t>(stride * sizeof(T)), samples,
                         static_cast<int64_t>(next * sizeof(T)), steps},
                        {then.parts[0], steps / Ahead::kParts},
                        {then.parts[1], steps / Ahead::kParts},
                        {then.parts[2], steps / Ahead::kParts}};
    int64_t done = 0;
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
        const int64_t part = last_panel ? 1 + std::min<int64_t>(done++ * Ahead::kParts / tiles, Ahead::kParts - 1) : 0;
        tile(matrix + first * samples, scale + first, rows, source, samples, ahead[part],
             out + first * out_stride + begin, out_stride, count);
      }
    }
  }
  if (streamed) fence();
}

#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
// Pairs of samples lie interleaved in the panel and in the matrix: each instruction adds two of a sum's products.
int64_t narrow_bytes(int64_t samples) { return samples * ((samples + 1) / 2) * sizeof(std::uint32_t); }

// Rounds a vector of a row to bfloat16. Returns false if that changes an element off the diagonal, which is the column
// `diagonal`. Its rest goes to `rest`.
bool round_row(const float* row, int64_t count, int64_t diagonal, bfloat16* narrow, float* rest) {
  const FloatVector values = count == kLanes<float> ? load(row) : load_partial<float>(row, count);
  store(narrow, values);
  if (any_lane(load(narrow) != values)) {
    for (int64_t k = 0; k < count; ++k) {
      narrow[k] = to_bfloat16(row[k]);  // of numbers below 2^-126 too
      if (k != diagonal && to_float(narrow[k]) != row[k]) return false;
    }
  }
  if (diagonal >= 0 && diagonal < count) *rest = row[diagonal] - to_float(narrow[diagonal]);
  return true;
}

// Packs the rows [begin, begin + R) of a matrix.
template <int R>
bool pack_rows(const float* matrix, int64_t row_stride, int64_t samples, int64_t begin, std::uint32_t* packed,
               float* rest) {
  constexpr int64_t kStep = kLanes<float>;
  std::uint32_t lines[R][kStep / 2];
  for (int64_t j = 0; j < samples; j += kStep) {
    const int64_t count = std::min(kStep, samples - j);
    for (int r = 0; r < R; ++r) {
      bfloat16 narrow[kStep];
      const float* row = matrix + (begin + r) * row_stride + j;
      if (!round_row(row, count, begin + r - j, narrow, rest + begin + r)) return false;
      std::memcpy(lines[r], narrow, sizeof narrow);
    }
    for (int64_t pair = 0; pair < (count + 1) / 2; ++pair) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) *packed++ = lines[r][pair];
    }
  }
  return true;
}

using PackRows = bool (*)(const float*, int64_t, int64_t, int64_t, std::uint32_t*, float*);

template <int R = kOutputs>
PackRows pack_rows_of(int64_t rows) {
  if (rows < R) {
    if constexpr (R > 1) return pack_rows_of<R - 1>(rows);
  }
  return pack_rows<R>;
}

bool pack_narrow(const float* matrix, int64_t row_stride, int64_t samples, void* data, float* rest) {
  auto* packed = static_cast<std::uint32_t*>(data);
  for (int64_t block = 0; block < blocks_of(samples); ++block) {
    const int64_t begin = block_start(block, samples), rows = block_start(block + 1, samples) - begin;
    if (!pack_rows_of(rows)(matrix, row_stride, samples, begin, packed, rest)) return false;
    packed += rows * ((samples + 1) / 2);
  }
  return true;
}

// Computes R outputs of kColumns vectors. `x` holds the rows of the same samples.
template <int R, Store S>
void narrow_tile(const std::uint32_t* packed, const float* rest, const double* scale, const Bfloat16Vector* pairs,
                 int64_t samples, const bfloat16* x, int64_t x_stride, Prefetch& next, bfloat16* out,
                 int64_t out_stride, int64_t count) {
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

void combine_narrow(const void* data, const float* rest, const double* scale, const bfloat16* x, int64_t stride,
                    int64_t samples, int64_t dim, bfloat16* out, int64_t out_stride, const Ahead& then) {
  constexpr int64_t kWidth = kLanes<float> * kColumns;
  const int64_t pairs = (samples + 1) / 2, blocks = blocks_of(samples);
  const int64_t width = panel_width(2 * samples, sizeof(bfloat16), kWidth, kWidth, 512);
  const auto* packed = static_cast<const std::uint32_t*>(data);
  auto* const rows = reinterpret_cast<Bfloat16Vector*>(panel<bfloat16>(0, 2 * pairs * kWidth));
  for (int64_t k = 0; k < dim; k += width) {
    const int64_t take = std::min(width, dim - k), next = std::min(width, dim - k - take);
    const int64_t tiles = (take + kWidth - 1) / kWidth * blocks, steps = tiles * pairs;
    const bool last = next == 0;
    Prefetch ahead[] = {{x + k + take, static_cast<int64_t>(stride * sizeof(bfloat16)), samples,
                         static_cast<int64_t>(next * sizeof(bfloat16)), steps},
                        {then.parts[0], steps / Ahead::kParts},
                        {then.parts[1], steps / Ahead::kParts},
                        {then.parts[2], steps / Ahead::kParts}};
    int64_t done = 0;
    for (int64_t begin = k; begin < k + take; begin += kWidth) {
      const int64_t count = std::min(kWidth, k + take - begin);
      interleave_pairs(x + begin, stride, samples, count, kColumns, rows);
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block_start(block, samples), height = block_start(block + 1, samples) - first;
        const auto tile =
            count < kWidth ? narrow_tile_of<Store::partial>(height) : narrow_tile_of<Store::whole>(height);
        const int64_t part = last ? 1 + std::min<int64_t>(done++ * Ahead::kParts / tiles, Ahead::kParts - 1) : 0;
        tile(packed + first * pairs, rest + first, scale + first, rows, samples, x + first * stride + begin, stride,
             ahead[part], out + first * out_stride + begin, out_stride, count);
      }
    }
  }
}

#endif

}  // namespace

extern const CombineKernel combine_kernels[kDTypes] = {combine<float>, combine<double>, combine<bfloat16>,
                                                       combine<float16>};
extern const PackKernel<float> pack_float[kDTypes] = {pack<float, float>, pack<double, float>, pack<bfloat16, float>,
                                                      pack<float16, float>};
extern const PackKernel<double> pack_double[kDTypes] = {pack<float, double>, pack<double, double>,
                                                        pack<bfloat16, double>, pack<float16, double>};
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
extern const NarrowKernels narrow_kernels = {narrow_bytes, pack_narrow, combine_narrow};
#endif

}  // namespace icsd::cpu::ICSD_ISA
