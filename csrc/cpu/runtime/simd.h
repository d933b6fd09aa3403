// Vectors of one register, in the compiler's vector extensions. AVX-512, AVX2 and the portable build share this source;
// they differ in their flags and in the sizes below.
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "icsd needs GCC 12 or later: install it, and set CXX, e.g. CXX=g++-12"
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/dtype.h"
#include "core/math.h"

#if defined(__AVX512F__)
#define ICSD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ICSD_VECTOR_BYTES 32
#else
#define ICSD_VECTOR_BYTES 16
#endif

namespace icsd::cpu::ICSD_ISA {

typedef float FloatVector __attribute__((vector_size(ICSD_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(ICSD_VECTOR_BYTES)));
typedef std::uint32_t UintVector __attribute__((vector_size(ICSD_VECTOR_BYTES)));
typedef std::uint64_t LongVector __attribute__((vector_size(ICSD_VECTOR_BYTES)));
typedef std::int32_t IntVector __attribute__((vector_size(ICSD_VECTOR_BYTES)));
typedef std::int64_t LongIntVector __attribute__((vector_size(ICSD_VECTOR_BYTES)));
typedef std::uint16_t HalfBits __attribute__((vector_size(ICSD_VECTOR_BYTES / 2)));

typedef std::uint16_t Bfloat16Vector __attribute__((vector_size(ICSD_VECTOR_BYTES)));

template <class P>
struct VectorOf {
  using type = FloatVector;
};
template <>
struct VectorOf<double> {
  using type = DoubleVector;
};
template <>
struct VectorOf<bfloat16> {
  using type = Bfloat16Vector;
};
template <class P>
using Vector = typename VectorOf<P>::type;
template <class P>
constexpr int kLanes = ICSD_VECTOR_BYTES / sizeof(P);

// The type that a Gram matrix multiplies: the type of the elements if the processor multiplies it into wider sums, else
// the compute type.
#if defined(__AVX512BF16__)
template <class T>
using Operand = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, Compute<T>>;
#else
template <class T>
using Operand = Compute<T>;
#endif

inline FloatVector load(const float* p) {
  FloatVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline DoubleVector load(const double* p) {
  DoubleVector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline UintVector widen(const std::uint16_t* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return __builtin_convertvector(bits, UintVector);
}

inline FloatVector load(const bfloat16* p) {
  const UintVector bits = widen(&p->bits) << 16;
  FloatVector v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline FloatVector load(const float16* p) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  const UintVector half = widen(&p->bits);
  const UintVector magnitude = (half & 0x7fffu) << 13;
  FloatVector v;
  std::memcpy(&v, &magnitude, sizeof v);
  v *= 0x1p112f;  // rebias the exponent; subnormals come out exact
  UintVector bits;
  std::memcpy(&bits, &v, sizeof v);
  const UintVector special = reinterpret_cast<UintVector>(magnitude >= 0x0f800000u);  // Inf and NaN
  bits |= (special & 0x7f800000u) | ((half & 0x8000u) << 16);
  std::memcpy(&v, &bits, sizeof v);
  return v;
#endif
}

// Loads a vector of P from elements that are P or are converted to it.
template <class P, class T>
inline Vector<P> load_as(const T* p) {
  if constexpr (std::is_same_v<P, T>) {
    Vector<P> v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    return load(p);
  }
}

// Loads the first `count` elements and zeros after them. Reads nothing past them.
template <class P, class T>
inline Vector<P> load_partial(const T* p, std::int64_t count) {
  T padded[kLanes<P>] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load_as<P>(padded);
}

inline void store(float* p, FloatVector v) { std::memcpy(p, &v, sizeof v); }
inline void store(double* p, DoubleVector v) { std::memcpy(p, &v, sizeof v); }
inline void store(bfloat16* p, Bfloat16Vector v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even. The instruction takes numbers below 2^-126 for zero.
inline void store(bfloat16* p, FloatVector v) {
#if defined(__AVX512BF16__)
  const __m256bh out = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
#else
  UintVector bits;
  std::memcpy(&bits, &v, sizeof v);
  const UintVector nan = reinterpret_cast<UintVector>(v != v);
  const UintVector rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const HalfBits out = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), HalfBits);
#endif
  std::memcpy(p, &out, sizeof out);
}

inline void store(float16* p, FloatVector v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  UintVector bits;
  std::memcpy(&bits, &v, sizeof v);
  const UintVector sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  const UintVector nan = reinterpret_cast<UintVector>(bits > 0x7f800000u);
  const UintVector overflow = reinterpret_cast<UintVector>(bits >= 0x477ff000u);  // rounds past 65504, or Inf
  const UintVector tiny = reinterpret_cast<UintVector>(bits < 0x38800000u);       // below 2^-14: subnormal
  FloatVector magnitude;
  std::memcpy(&magnitude, &bits, sizeof bits);
  magnitude += 0.5f;  // the adder rounds to multiples of 2^-24, the half subnormal's unit
  UintVector subnormal;
  std::memcpy(&subnormal, &magnitude, sizeof bits);
  subnormal -= 0x3f000000u;
  const UintVector normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  UintVector half = (tiny & subnormal) | (~tiny & normal);
  half = (overflow & 0x7c00u) | (~overflow & half);
  half = (nan & 0x7e00u) | (~nan & half);
  const HalfBits out = __builtin_convertvector(half | sign, HalfBits);
  std::memcpy(p, &out, sizeof out);
#endif
}

template <class T, class V>
inline void store_partial(T* p, V v, std::int64_t count) {
  T padded[kLanes<Compute<T>>];
  store(padded, v);
  std::memcpy(p, padded, count * sizeof(T));
}

// Stores past the cache, to an address aligned to a vector. `fence` must come before another thread reads it.
template <class T>
constexpr bool kStreams = false;
#if defined(__AVX512F__) || defined(__AVX2__)
template <>
inline constexpr bool kStreams<float> = true;
template <>
inline constexpr bool kStreams<double> = true;
#endif
#if defined(__AVX512F__)
inline void stream(float* p, FloatVector v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
inline void stream(double* p, DoubleVector v) { _mm512_stream_pd(p, reinterpret_cast<__m512d>(v)); }
inline void fence() { _mm_sfence(); }
#elif defined(__AVX2__)
inline void stream(float* p, FloatVector v) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
inline void stream(double* p, DoubleVector v) { _mm256_stream_pd(p, reinterpret_cast<__m256d>(v)); }
inline void fence() { _mm_sfence(); }
#else
template <class T, class V>
inline void stream(T* p, V v) {
  store(p, v);
}
inline void fence() {}
#endif

// Returns the sum of all lanes.
#if defined(__AVX512F__)
inline float sum(FloatVector v) { return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v)); }
inline double sum(DoubleVector v) { return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v)); }
#elif defined(__AVX2__)
inline float sum(FloatVector v) {
  const __m256 wide = reinterpret_cast<__m256>(v);
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(wide), _mm256_extractf128_ps(wide, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline double sum(DoubleVector v) {
  const __m256d wide = reinterpret_cast<__m256d>(v);
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(wide), _mm256_extractf128_pd(wide, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
#else
inline float sum(FloatVector v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline double sum(DoubleVector v) { return v[0] + v[1]; }
#endif

// Returns sums + a b. Where sums are wider than the factors, the products of two neighbors go into one sum.
template <class V>
inline V multiply_add(V a, V b, V sums) {
  return sums + a * b;
}
#if defined(__AVX512BF16__)
inline FloatVector multiply_add(Bfloat16Vector a, Bfloat16Vector b, FloatVector sums) {
  return reinterpret_cast<FloatVector>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
#endif

// Computes the sum of each vector.
template <int kCount, class V, class C>
inline void sum_each(const V (&vectors)[kCount], C* sums) {
#if defined(__AVX512F__)
  if constexpr (kCount == 16 && std::is_same_v<C, float>) {
    // Halves the vectors four times: each step adds the halves of two vectors into the halves of one.
    __m512 v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = reinterpret_cast<__m512>(vectors[i]);
    for (int i = 0; i < 8; ++i) {
      v[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
      v[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)) + _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    for (int count = 2; count > 0; count /= 2) {
      for (int i = 0; i < count; ++i) {
        v[i] = _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88) + _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd);
      }
    }
    _mm512_storeu_ps(sums, v[0]);
    return;
  }
#endif
  for (int i = 0; i < kCount; ++i) sums[i] = sum(vectors[i]);
}

// Exchanges lane l of `a` with lane l - step of `b` for all l with that bit set.
template <int kStep, std::size_t... kLane, class V>
inline void exchange(V& a, V& b, std::index_sequence<kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  const V low = __builtin_shufflevector(a, b, (kLane & kStep ? kCount + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kCount + kLane : kLane + kStep)...);
  a = low;
}

template <int kStep = 1, class V, std::size_t kCount>
inline void transpose_lanes(V (&rows)[kCount]) {
  if constexpr (kStep < kCount) {
    for (std::size_t i = 0; i < kCount; ++i) {
      if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_index_sequence<kCount>{});
    }
    transpose_lanes<2 * kStep>(rows);
  }
}

// Returns the larger or the smaller of a number and each lane, which is NaN where the lane is.
#if defined(__AVX512F__)
inline FloatVector at_least(float least, FloatVector v) {
  return reinterpret_cast<FloatVector>(_mm512_max_ps(_mm512_set1_ps(least), reinterpret_cast<__m512>(v)));
}
inline FloatVector at_most(float most, FloatVector v) {
  return reinterpret_cast<FloatVector>(_mm512_min_ps(_mm512_set1_ps(most), reinterpret_cast<__m512>(v)));
}
inline DoubleVector at_least(double least, DoubleVector v) {
  return reinterpret_cast<DoubleVector>(_mm512_max_pd(_mm512_set1_pd(least), reinterpret_cast<__m512d>(v)));
}
inline DoubleVector at_most(double most, DoubleVector v) {
  return reinterpret_cast<DoubleVector>(_mm512_min_pd(_mm512_set1_pd(most), reinterpret_cast<__m512d>(v)));
}
#elif defined(__AVX2__)
inline FloatVector at_least(float least, FloatVector v) {
  return reinterpret_cast<FloatVector>(_mm256_max_ps(_mm256_set1_ps(least), reinterpret_cast<__m256>(v)));
}
inline FloatVector at_most(float most, FloatVector v) {
  return reinterpret_cast<FloatVector>(_mm256_min_ps(_mm256_set1_ps(most), reinterpret_cast<__m256>(v)));
}
inline DoubleVector at_least(double least, DoubleVector v) {
  return reinterpret_cast<DoubleVector>(_mm256_max_pd(_mm256_set1_pd(least), reinterpret_cast<__m256d>(v)));
}
inline DoubleVector at_most(double most, DoubleVector v) {
  return reinterpret_cast<DoubleVector>(_mm256_min_pd(_mm256_set1_pd(most), reinterpret_cast<__m256d>(v)));
}
#else
template <class C, class V>
inline V at_least(C least, V v) {
  return v < least ? V{} + least : v;
}
template <class C, class V>
inline V at_most(C most, V v) {
  return v > most ? V{} + most : v;
}
#endif

// Returns 1 / k!.
constexpr double inverse_factorial(int k) { return k > 0 ? inverse_factorial(k - 1) / k : 1; }

// Computes e^x by its series around the nearest multiple n ln 2. Adding 1.5 · 2^mantissa leaves n in the low bits, from
// where it is shifted into the exponent of 2^n. Arguments are clamped so that results are normal numbers; NaN stays
// NaN.
template <class V, class U, int kMantissa, int kTerms>
inline V exponential(V x, double least, double ln2_high, double ln2_low) {
  using C = std::remove_reference_t<decltype(x[0])>;
  constexpr C kShift = C(1.5) * C(std::uint64_t{1} << kMantissa);
  constexpr std::uint64_t kBias = (std::uint64_t{1} << (8 * sizeof(C) - kMantissa - 2)) - 1;
  x = at_most(C(-least), at_least(C(least), x));
  const V shifted = x * C(1.4426950408889634) + kShift;
  const V n = shifted - kShift;
  const V r = (x - n * C(ln2_high)) - n * C(ln2_low);
  V series = V{} + C(inverse_factorial(kTerms));
  for (int k = kTerms - 1; k >= 0; --k) series = series * r + C(inverse_factorial(k));
  U bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + kBias) << kMantissa;
  V power;
  std::memcpy(&power, &bits, sizeof bits);
  return series * power;
}

// Computes ln x of positive normal numbers x = 2^n m, sqrt(1/2) <= m < sqrt(2), by the series of
// 2 artanh((m - 1) / (m + 1)). NaN and Inf give NaN.
template <class V, class U, class I, int kMantissa, int kTerms>
inline V logarithm(V x) {
  using C = std::remove_reference_t<decltype(x[0])>;
  C root = C(0.70710678118654752);
  std::remove_reference_t<decltype(U{}[0])> root_bits;
  std::memcpy(&root_bits, &root, sizeof root);
  U bits;
  std::memcpy(&bits, &x, sizeof bits);
  const U exponent = (bits - root_bits) & ~(((U{} + 1) << kMantissa) - 1);
  const U mantissa = bits - exponent;
  V m;
  std::memcpy(&m, &mantissa, sizeof m);
  const V n = __builtin_convertvector(reinterpret_cast<I>(exponent) >> kMantissa, V);
  const V z = (m - 1) / (m + 1), square = z * z;
  V series{};
  for (int k = kTerms; k > 0; --k) series = series * square + C(2.0 / (2 * k - 1));
  return n * C(0.69314718055994531) + z * series + (x - x);
}

// Tells whether a comparison is true in any lane.
template <class M>
inline bool any_lane(M mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
  bool any = false;
  for (std::size_t lane = 0; lane < sizeof(M) / sizeof(mask[0]); ++lane) any |= mask[lane] != 0;
  return any;
#endif
}

}  // namespace icsd::cpu::ICSD_ISA

namespace icsd {

template <>
struct Math<cpu::ICSD_ISA::FloatVector> {
  using V = cpu::ICSD_ISA::FloatVector;
  static ICSD_HD V exp(V x) {
    return cpu::ICSD_ISA::exponential<V, cpu::ICSD_ISA::UintVector, 23, 7>(x, -87, 0.693359375, -2.12194440e-4);
  }
  static ICSD_HD V log(V x) {
    return cpu::ICSD_ISA::logarithm<V, cpu::ICSD_ISA::UintVector, cpu::ICSD_ISA::IntVector, 23, 5>(x);
  }
  template <class M>
  static ICSD_HD bool any(M mask) {
    return cpu::ICSD_ISA::any_lane(mask);
  }
};

template <>
struct Math<cpu::ICSD_ISA::DoubleVector> {
  using V = cpu::ICSD_ISA::DoubleVector;
  static ICSD_HD V exp(V x) {
    return cpu::ICSD_ISA::exponential<V, cpu::ICSD_ISA::LongVector, 52, 13>(x, -708, 6.93147180369123816490e-01,
                                                                            1.90821492927058770002e-10);
  }
  static ICSD_HD V log(V x) {
    return cpu::ICSD_ISA::logarithm<V, cpu::ICSD_ISA::LongVector, cpu::ICSD_ISA::LongIntVector, 52, 11>(x);
  }
  template <class M>
  static ICSD_HD bool any(M mask) {
    return cpu::ICSD_ISA::any_lane(mask);
  }
};

}  // namespace icsd
