// Compiled once for each instruction set, with ICSD_ISA its namespace.
#include "cpu/kernels.h"

#include <algorithm>

#include "cpu/simd.h"

#define ICSD_STRING_(x) #x
#define ICSD_STRING(x) ICSD_STRING_(x)

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// Register tiles: Gram kTile x kTile sums; combine up to kRows outputs x kColumns vectors.
#if defined(__AVX512F__)
constexpr int kTile = 4, kRows = 6, kColumns = 4;
#elif defined(__AVX2__)
constexpr int kTile = 3, kRows = 6, kColumns = 2;
#else
constexpr int kTile = 3, kRows = 4, kColumns = 2;
#endif

// The products of rows i.. and j.. (I x J of them) over all features: gram[i+r][j+c] += <x_{i+r}, x_{j+c}>.
template <class T, int I, int J>
void gram_tile(const T* a, const T* b, int64_t stride, int64_t features, double* gram, int64_t gram_stride) {
  using C = Compute<T>;
  constexpr int kStep = kLanes<C>;
  Vector<C> sums[I][J] = {};
  const auto accumulate = [&](auto load_at) __attribute__((always_inline)) {
    Vector<C> left[I];
    for (int r = 0; r < I; ++r) left[r] = load_at(a + r * stride);
    for (int c = 0; c < J; ++c) {
      const Vector<C> right = load_at(b + c * stride);
      for (int r = 0; r < I; ++r) sums[r][c] += left[r] * right;
    }
  };
  int64_t k = 0;
  for (; k + kStep <= features; k += kStep) {
    accumulate([&](const T* row) __attribute__((always_inline)) { return load(row + k); });
  }
  if (k < features) {
    accumulate([&](const T* row) __attribute__((always_inline)) { return load_partial(row + k, features - k); });
  }
  for (int r = 0; r < I; ++r) {
    for (int c = 0; c < J; ++c) gram[r * gram_stride + c] += sum<C>(sums[r][c]);
  }
}

template <class T, int I>
void gram_columns(int columns, const T* a, const T* b, int64_t stride, int64_t features, double* gram,
                  int64_t gram_stride) {
  switch (columns) {
    case 1: return gram_tile<T, I, 1>(a, b, stride, features, gram, gram_stride);
    case 2: return gram_tile<T, I, 2>(a, b, stride, features, gram, gram_stride);
    case 3: return gram_tile<T, I, 3>(a, b, stride, features, gram, gram_stride);
    default: return gram_tile<T, I, kTile>(a, b, stride, features, gram, gram_stride);
  }
}

template <class T>
void gram(const void* data, int64_t stride, int64_t features, GramBlock block, double* out, int64_t gram_stride) {
  const T* x = static_cast<const T*>(data);
  for (int64_t i = block.row_begin; i < block.row_end; i += kTile) {
    const int rows = static_cast<int>(std::min<int64_t>(kTile, block.row_end - i));
    for (int64_t j = block.column_begin; j < block.column_end && j < i + rows; j += kTile) {
      const int columns = static_cast<int>(std::min<int64_t>(kTile, block.column_end - j));
      const T *a = x + i * stride, *b = x + j * stride;
      double* tile = out + (i - block.row_begin) * gram_stride + (j - block.column_begin);
      switch (rows) {
        case 1: gram_columns<T, 1>(columns, a, b, stride, features, tile, gram_stride); break;
        case 2: gram_columns<T, 2>(columns, a, b, stride, features, tile, gram_stride); break;
        case 3: gram_columns<T, 3>(columns, a, b, stride, features, tile, gram_stride); break;
        default: gram_columns<T, kTile>(columns, a, b, stride, features, tile, gram_stride);
      }
    }
  }
}

// Outputs are shared out evenly over blocks of at most kRows, so that no block is nearly empty.
int64_t blocks_of(int64_t outputs) { return (outputs + kRows - 1) / kRows; }
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

// `columns` features (kColumns vectors, or a tail of one) of R outputs.
template <class T, int R, int V>
void combine_tile(const Compute<T>* packed, const double* scale, const T* x, int64_t stride, int64_t samples,
                  int64_t columns, T* out, int64_t out_stride) {
  using C = Compute<T>;
  constexpr int kStep = kLanes<C>;
  const bool whole = columns == V * kStep;
  Vector<C> sums[R][V] = {};
  for (int64_t j = 0; j < samples; ++j, packed += R, x += stride) {
    Vector<C> row[V];
    if (whole) {
      for (int v = 0; v < V; ++v) row[v] = load(x + v * kStep);
    } else {
      row[0] = load_partial(x, columns);
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] += packed[r] * row[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    const C factor = static_cast<C>(scale[r]);
    for (int v = 0; v < V; ++v) {
      const Vector<C> value = sums[r][v] * factor;
      if (whole) {
        store(out + r * out_stride + v * kStep, value);
      } else {
        store_partial(out + r * out_stride, value, columns);
      }
    }
  }
}

template <class T, int V>
void combine_columns(const Compute<T>* packed, const double* scale, const T* x, int64_t stride, int64_t samples,
                     int64_t columns, T* out, int64_t out_stride, int64_t outputs) {
  for (int64_t block = 0; block < blocks_of(outputs); ++block) {
    const int64_t begin = block_start(block, outputs), rows = block_start(block + 1, outputs) - begin;
    const auto* p = packed + begin * samples;
    T* y = out + begin * out_stride;
    const double* s = scale + begin;
    switch (rows) {
      case 6: if constexpr (kRows >= 6) { combine_tile<T, 6, V>(p, s, x, stride, samples, columns, y, out_stride); } break;
      case 5: if constexpr (kRows >= 5) { combine_tile<T, 5, V>(p, s, x, stride, samples, columns, y, out_stride); } break;
      case 4: combine_tile<T, 4, V>(p, s, x, stride, samples, columns, y, out_stride); break;
      case 3: combine_tile<T, 3, V>(p, s, x, stride, samples, columns, y, out_stride); break;
      case 2: combine_tile<T, 2, V>(p, s, x, stride, samples, columns, y, out_stride); break;
      default: combine_tile<T, 1, V>(p, s, x, stride, samples, columns, y, out_stride);
    }
  }
}

template <class T>
void combine(const void* packed, const double* scale, const void* data, int64_t stride, int64_t samples,
             int64_t features, void* result, int64_t out_stride, int64_t outputs) {
  constexpr int kStep = kLanes<Compute<T>>;
  const T* x = static_cast<const T*>(data);
  T* out = static_cast<T*>(result);
  const auto* p = static_cast<const Compute<T>*>(packed);
  int64_t k = 0;
  for (; k + kColumns * kStep <= features; k += kColumns * kStep) {
    combine_columns<T, kColumns>(p, scale, x + k, stride, samples, kColumns * kStep, out + k, out_stride, outputs);
  }
  for (; k < features; k += kStep) {
    const int64_t columns = std::min<int64_t>(kStep, features - k);
    combine_columns<T, 1>(p, scale, x + k, stride, samples, columns, out + k, out_stride, outputs);
  }
}

}  // namespace

const Kernels kernels = {
    ICSD_STRING(ICSD_ISA),
    {gram<float>, gram<double>, gram<bfloat16>, gram<float16>},
    {combine<float>, combine<double>, combine<bfloat16>, combine<float16>},
    {pack<float, float>, pack<double, float>, pack<bfloat16, float>, pack<float16, float>},
    {pack<float, double>, pack<double, double>, pack<bfloat16, double>, pack<float16, double>},
};

}  // namespace icsd::cpu::ICSD_ISA
