// The kernels of products.h. Compiled once for each instruction set, with ICSD_ISA its namespace.
#include "cpu/kernels/products.h"

#include <algorithm>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/simd.h"

namespace icsd::cpu::ICSD_ISA {
namespace {

using std::int64_t;

// A register tile has kRows x kVectors sums.
#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;
#elif defined(__AVX2__)
constexpr int kRows = 4, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

template <class C>
constexpr int64_t kPanel = kVectors * kLanes<C>;
static_assert(kBlock % kPanel<float> == 0 && kBlock % kPanel<double> == 0);
static_assert(kPanel<float> % kRows == 0 && kPanel<double> % kRows == 0);

typedef float HalfFloatVector __attribute__((vector_size(ICSD_VECTOR_BYTES / 2)));

// Loads `count` elements, at most a vector of C, as C, and zeros after them.
template <class C, class T>
Vector<C> load_some(const T* p, int64_t count) {
  if constexpr (std::is_same_v<Compute<T>, C>) {
    return count == kLanes<C> ? load(p) : load_partial<C>(p, count);
  } else {
    HalfFloatVector half;
    if (std::is_same_v<T, float> && count == kLanes<C>) {
      std::memcpy(&half, p, sizeof half);
    } else {
      const FloatVector whole = load_partial<float>(p, count);
      std::memcpy(&half, &whole, sizeof half);
    }
    return __builtin_convertvector(half, DoubleVector);
  }
}

template <class C, class T>
void store_some(T* p, Vector<C> v, int64_t count) {
  if constexpr (std::is_same_v<Compute<T>, C>) {
    if (count == kLanes<C>) {
      store(p, v);
    } else {
      store_partial(p, v, count);
    }
  } else {
    const HalfFloatVector half = __builtin_convertvector(v, HalfFloatVector);
    FloatVector whole{};
    std::memcpy(&whole, &half, sizeof half);
    store_partial(p, whole, count);
  }
}

template <class C, class T>
void squares(const void* data, int64_t stride, int64_t samples, int64_t dim, C* out) {
  constexpr int64_t kStep = kLanes<double>;
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < samples; ++i, x += stride) {
    DoubleVector sums[2] = {};
    int64_t k = 0;
    for (; k + 2 * kStep <= dim; k += 2 * kStep) {
      for (int part = 0; part < 2; ++part) {
        const DoubleVector value = load_some<double>(x + k + part * kStep, kStep);
        sums[part] += value * value;
      }
    }
    for (; k < dim; k += kStep) {
      const DoubleVector value = load_some<double>(x + k, std::min(kStep, dim - k));
      sums[0] += value * value;
    }
    out[i] = static_cast<C>(sum(sums[0] + sums[1]));
  }
}

template <class C, class T>
void by_feature(const void* data, int64_t stride, int64_t samples, int64_t dim, const C* scale, C* panels,
                int64_t panel_stride) {
  constexpr int64_t kStep = kLanes<C>;
  const T* x = static_cast<const T*>(data);
  for (int64_t i = 0; i < samples; ++i, x += stride) {
    const C factor = scale ? scale[i] : C(1);
    for (int64_t k = 0; k < dim; k += kPanel<C>) {
      C* to = panels + k / kPanel<C> * panel_stride + i * kPanel<C>;
      for (int64_t v = 0; v < kPanel<C>; v += kStep) {
        const int64_t count = std::clamp<int64_t>(dim - k - v, 0, kStep);
        store(to + v, factor * (count > 0 ? load_some<C>(x + k + v, count) : Vector<C>{}));
      }
    }
  }
}

template <class C, class T>
void by_sample(const void* data, int64_t stride, int64_t samples, int64_t dim, const C* scale, C* panels,
               int64_t panel_stride) {
  constexpr int64_t kStep = kLanes<C>;
  const T* x = static_cast<const T*>(data);
  const int64_t padded = (samples + kPanel<C> - 1) / kPanel<C> * kPanel<C>;
  for (int64_t i = 0; i < padded; i += kStep) {
    C* to = panels + i / kPanel<C> * panel_stride + i % kPanel<C>;
    for (int64_t k = 0; k < dim; k += kStep) {
      const int64_t count = std::min(kStep, dim - k);
      Vector<C> rows[kStep];
      for (int64_t r = 0; r < kStep; ++r) {
        rows[r] = i + r < samples ? (scale ? scale[i + r] : C(1)) * load_some<C>(x + (i + r) * stride + k, count)
                                  : Vector<C>{};
      }
      transpose_lanes(rows);
      for (int64_t r = 0; r < count; ++r) store(to + (k + r) * kPanel<C>, rows[r]);
    }
  }
}

template <class C>
void tile(const C* a, int64_t a_step, const C* b, int64_t depth, C* out, int64_t out_stride, bool add) {
  Vector<C> sums[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector<C>{};
  }
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += kPanel<C>) {
    Vector<C> right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes<C>);
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[r] * right[v];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      C* to = out + r * out_stride + v * kLanes<C>;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
  }
}

template <class C>
void multiply(Panels<C> a, Panels<C> b, int64_t rows, int64_t columns, int64_t depth, C* out, int64_t out_stride,
              bool add) {
  for (int64_t k = 0; k < depth || k == 0; k += kBlock) {
    const int64_t terms = std::min(kBlock, depth - k);
    for (int64_t c = 0; c < columns; c += kPanel<C>) {
      for (int64_t r = 0; r < rows; r += kRows) {
        tile(a.from(k, r).data, a.step, b.from(k, c).data, terms, out + r * out_stride + c, out_stride, add || k > 0);
      }
    }
  }
}

template <class C>
void transpose(const C* block, C* transposed) {
  constexpr int64_t kStep = kLanes<C>;
  for (int64_t i = 0; i < kBlock; i += kStep) {
    for (int64_t j = 0; j < kBlock; j += kStep) {
      Vector<C> rows[kStep];
      for (int64_t r = 0; r < kStep; ++r) rows[r] = load(block + (i + r) * kBlock + j);
      transpose_lanes(rows);
      for (int64_t r = 0; r < kStep; ++r) store(transposed + (j + r) * kBlock + i, rows[r]);
    }
  }
}

template <class C, class T>
void center(const void* data, int64_t stride, int64_t samples, int64_t dim, C* out, int64_t out_stride) {
  constexpr int64_t kStep = kLanes<C>, kVectors = 16;  // of a row at a time, whose sums stay in the nearest cache
  const T* x = static_cast<const T*>(data);
  for (int64_t begin = 0; begin < dim; begin += kVectors * kStep) {
    const int64_t end = std::min(begin + kVectors * kStep, dim);
    Vector<C> sums[kVectors] = {};
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = begin; k < end; k += kStep) {
        const int64_t count = std::min(kStep, end - k);
        const Vector<C> difference = load_some<C>(x + i * stride + k, count) - load_some<C>(x + k, count);
        sums[(k - begin) / kStep] += difference;
        store_some<C>(out + i * out_stride + k, difference, count);
      }
    }
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = begin; k < end; k += kStep) {
        const int64_t count = std::min(kStep, end - k);
        C* to = out + i * out_stride + k;
        store_some<C>(to, load_some<C>(to, count) - sums[(k - begin) / kStep] * (1 / static_cast<C>(samples)), count);
      }
    }
  }
}

template <class C, class T>
void finish(const C* h, const void* data, int64_t dim, C r, bool project, C factor, void* out) {
  constexpr int64_t kStep = kLanes<C>;
  const T* x = static_cast<const T*>(data);
  Vector<C> products{};
  for (int64_t k = 0; project && k < dim; k += kStep) {
    const int64_t count = std::min(kStep, dim - k);
    products += load_some<C>(h + k, count) * (r * load_some<C>(x + k, count));
  }
  const C projection = sum(products);
  for (int64_t k = 0; k < dim; k += kStep) {
    const int64_t count = std::min(kStep, dim - k);
    const Vector<C> direction = r * load_some<C>(x + k, count);
    store_some<C>(static_cast<T*>(out) + k, (factor * r) * (load_some<C>(h + k, count) - projection * direction),
                  count);
  }
}

}  // namespace

extern const ProductKernels<float> products_float = {
    kPanel<float>,
    {squares<float, float>, nullptr, squares<float, bfloat16>, squares<float, float16>},
    {by_feature<float, float>, nullptr, by_feature<float, bfloat16>, by_feature<float, float16>},
    {by_sample<float, float>, nullptr, by_sample<float, bfloat16>, by_sample<float, float16>},
    multiply<float>,
    transpose<float>,
    {center<float, float>, nullptr, center<float, bfloat16>, center<float, float16>},
    {finish<float, float>, nullptr, finish<float, bfloat16>, finish<float, float16>},
};
extern const ProductKernels<double> products_double = {
    kPanel<double>,
    {squares<double, float>, squares<double, double>, squares<double, bfloat16>, squares<double, float16>},
    {by_feature<double, float>, by_feature<double, double>, by_feature<double, bfloat16>, by_feature<double, float16>},
    {by_sample<double, float>, by_sample<double, double>, by_sample<double, bfloat16>, by_sample<double, float16>},
    multiply<double>,
    transpose<double>,
    {center<double, float>, center<double, double>, center<double, bfloat16>, center<double, float16>},
    {finish<double, float>, finish<double, double>, finish<double, bfloat16>, finish<double, float16>},
};

}  // namespace icsd::cpu::ICSD_ISA
