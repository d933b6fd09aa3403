// The kernel of gram.h: sums of products of samples over some features. Compiled once for each instruction set, with
// ICSD_ISA its namespace.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/panel.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// A register tile has kTile x kTile sums.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 3;
#endif

constexpr int64_t kLeastBytes = 2 << 10, kMostBytes = 16 << 10;  // of a row of a panel

// Adds a register tile of sums to doubles.
template <int I, int J, class C>
void add_tile(const C (&sums)[I * J], double* gram, int64_t gram_stride) {
  typedef C Four __attribute__((vector_size(4 * sizeof(C))));
  typedef double FourDoubles __attribute__((vector_size(4 * sizeof(double))));
  for (int r = 0; r < I; ++r, gram += gram_stride) {
    if constexpr (J == 4) {
      Four row;
      FourDoubles to;
      std::memcpy(&row, sums + r * J, sizeof row);
      std::memcpy(&to, gram, sizeof to);
      to += __builtin_convertvector(row, FourDoubles);
      std::memcpy(gram, &to, sizeof to);
    } else {
      for (int c = 0; c < J; ++c) gram[c] += sums[r * J + c];
    }
  }
}

// Adds <a_r, b_c> to gram[r][c] for I rows of `a` and J rows of `b`, of whole vectors and with the same stride. With
// kFill, the rows of `a` are read from `source` and left in the panel for the next tiles, while the processor
// multiplies. With kDiagonal, `b` is `a`, and one triangle is computed.
template <class T, int I, int J, bool kFill, bool kDiagonal>
void gram_tile(Rows<Operand<T>> a, Rows<Operand<T>> b, Rows<const T> source, int64_t width, Prefetch& next,
               double* gram, int64_t gram_stride) {
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
  add_tile<I, J>(totals, gram, gram_stride);
}

template <class T>
using GramTile = void (*)(Rows<Operand<T>>, Rows<Operand<T>>, Rows<const T>, int64_t, Prefetch&, double*, int64_t);

// Returns gram_tile for the number of rows and columns at an edge.
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
void gram(const void* data, int64_t stride, int64_t dim, GramBlock block, double* out, int64_t out_stride,
          const Ahead& then) {
  using P = Operand<T>;
  constexpr int kStep = kLanes<P>;
  const int64_t rows = block.row_end - block.row_begin, columns = block.column_end - block.column_begin;
  const bool on_diagonal = block.row_begin == block.column_begin;
  const int64_t samples = on_diagonal ? rows : rows + columns;
  const int64_t width = std::min(
      panel_width(samples, sizeof(P), kStep, kLeastBytes / sizeof(P), kMostBytes / sizeof(P)), round_up(dim, kStep));
  const int64_t panel_stride = width + kStep;  // not a power of two
  const Rows<P> panel_rows{panel<P>(0, samples * panel_stride), panel_stride};
  const T* x = static_cast<const T*>(data);

  const int64_t tiles = (rows + kTile - 1) / kTile * ((columns + kTile - 1) / kTile);
  for (int64_t k = 0; k < dim; k += width) {
    const int64_t take = std::min(width, dim - k), next = std::min(width, dim - k - take);
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
    const int64_t total = on_diagonal ? (tiles + 1) / 2 : tiles, steps = total * (width / kStep);
    const bool last_panel = next == 0;
    Prefetch ahead[] = {{x + block.row_begin * stride + k + take, static_cast<int64_t>(stride * sizeof(T)), rows,
                         static_cast<int64_t>(next * sizeof(T)), steps},
                        {then.parts[0], steps / Ahead::kParts},
                        {then.parts[1], steps / Ahead::kParts},
                        {then.parts[2], steps / Ahead::kParts}};
    int64_t done = 0;
    for (int64_t i = 0; i < rows; i += kTile) {
      const Rows<const T> source{x + (block.row_begin + i) * stride + k, stride};
      const int64_t last = on_diagonal ? i : (columns - 1) / kTile * kTile;
      for (int64_t j = last; j >= 0; j -= kTile) {  // the tile on the diagonal first: it has fewest products, and fills
        const int64_t height = std::min<int64_t>(kTile, rows - i), breadth = std::min<int64_t>(kTile, columns - j);
        const bool filling = whole && !in_place && j == last, diagonal = on_diagonal && j == i;
        const auto tile = filling ? gram_tile_of<T, true>(height, breadth, diagonal)
                                  : gram_tile_of<T, false>(height, breadth, diagonal);
        const int64_t part = last_panel ? 1 + std::min<int64_t>(done++ * Ahead::kParts / total, Ahead::kParts - 1) : 0;
        tile(a.from(i), b.from(j), source, round_up(take, kStep), ahead[part], out + i * out_stride + j, out_stride);
      }
    }
  }
}

// Loads up to a vector of doubles as C, and zeros after them.
template <class C>
Vector<C> load_doubles(const double* p, int64_t count) {
  double padded[kLanes<C>] = {};
  if (count < kLanes<C>) {
    std::copy_n(p, count, padded);
    p = padded;
  }
  C elements[kLanes<C>];
  for (int lane = 0; lane < kLanes<C>; ++lane) elements[lane] = static_cast<C>(p[lane]);
  return load(elements);
}

template <class C>
void store_up_to(C* to, Vector<C> v, int64_t count) {
  if (count == kLanes<C>) {
    store(to, v);
  } else {
    store_partial(to, v, count);
  }
}

// Writes a square of up to a vector of rows and columns to `lower` and, transposed, to `upper`. On the diagonal these
// are the same, and one triangle of the sums is read.
template <class C, bool kDiagonal>
void put_square(const double* sums, int64_t sums_stride, int64_t height, int64_t width, C* lower, C* upper,
                int64_t stride) {
  constexpr int kStep = kLanes<C>;
  Vector<C> rows[kStep], columns[kStep], lane_numbers;
#pragma GCC unroll 16
  for (int r = 0; r < kStep; ++r) {
    lane_numbers[r] = C(r);
    columns[r] = rows[r] = r < height ? load_doubles<C>(sums + r * sums_stride, width) : Vector<C>{};
  }
  transpose_lanes(columns);
#pragma GCC unroll 16
  for (int r = 0; r < kStep; ++r) {
    if (kDiagonal) rows[r] = lane_numbers <= C(r) ? rows[r] : columns[r];
    if (r < height) store_up_to(lower + r * stride, rows[r], width);
    if (!kDiagonal && r < width) store_up_to(upper + r * stride, columns[r], height);
  }
}

template <class C>
void put(const double* sums, int64_t sums_stride, GramBlock block, C* gram, int64_t stride) {
  constexpr int64_t kStep = kLanes<C>;
  const int64_t rows = block.row_end - block.row_begin, columns = block.column_end - block.column_begin;
  const bool on_diagonal = block.row_begin == block.column_begin;
  C* const lower = gram + block.row_begin * stride + block.column_begin;
  C* const upper = gram + block.column_begin * stride + block.row_begin;
  for (int64_t i = 0; i < rows; i += kStep) {
    const int64_t height = std::min(kStep, rows - i);
    for (int64_t j = 0; j < (on_diagonal ? i + 1 : columns); j += kStep) {
      const int64_t width = std::min(kStep, columns - j);
      const auto square = on_diagonal && i == j ? put_square<C, true> : put_square<C, false>;
      square(sums + i * sums_stride + j, sums_stride, height, width, lower + i * stride + j, upper + j * stride + i,
             stride);
    }
  }
}

}  // namespace

extern const PutKernel<float> put_float = put<float>;
extern const PutKernel<double> put_double = put<double>;

#if defined(__AMX_BF16__)
void gram_tiles(const void*, int64_t, int64_t, GramBlock, double*, int64_t, const Ahead&);
extern const GramKernel gram_kernels[kDTypes] = {gram<float>, gram<double>, gram_tiles, gram<float16>};
#else
extern const GramKernel gram_kernels[kDTypes] = {gram<float>, gram<double>, gram<bfloat16>, gram<float16>};
#endif

}  // namespace icsd::cpu::ICSD_ISA
