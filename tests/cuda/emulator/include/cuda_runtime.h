// CUDA's language and the part of its runtime that the launchers use.
#pragma once

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <type_traits>

#include "emulator.h"

#define ICSD_EMULATED 1

#define __host__
#define __device__
#define __global__ static
#define __constant__ static
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// The shared memory of a module is its thread-local storage, which the runtime makes NaN before each block;
// AddressSanitizer puts redzones around other statics only.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define ICSD_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(emulator::dynamic_shared())

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
constexpr int warpSize = 32;

// Barriers

inline void __syncthreads(EMULATOR_SITE) { emulator::block_barrier("__syncthreads", false, site); }
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier("__syncthreads_count", predicate, site);
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier("__syncthreads_or", predicate, site) != 0;
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  return emulator::block_barrier("__syncthreads_and", !predicate, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffff, EMULATOR_SITE) {
  emulator::warp_collective("__syncwarp", mask, nullptr, [](void* const*, unsigned) {}, site, true);
}
inline void __threadfence() { emulator::fence(); }

// Warps

namespace emulator {

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move 4 or 8 bytes");
  struct Lane {
    T value, result;
    unsigned source;
  } mine{value, value, source};
  if (!(mask >> source & 1))
    fail(site, "%s: lane %u reads lane %u, which mask %#x leaves out", name, lane(), source, mask);
  warp_collective(
      name, mask, &mine,
      [](void* const* lanes, unsigned mask) {
        for (int i = 0; i < 32; ++i) {
          if (!(mask >> i & 1)) continue;
          Lane& to = *static_cast<Lane*>(lanes[i]);
          to.result = static_cast<const Lane*>(lanes[to.source])->value;
        }
      },
      site);
  return mine.result;
}

template <class T, class F>
T reduce(const char* name, unsigned mask, T value, F, Site site) {
  warp_collective(
      name, mask, &value,
      [](void* const* lanes, unsigned mask) {
        bool first = true;
        T total{};
        for (int i = 0; i < 32; ++i) {
          if (!(mask >> i & 1)) continue;
          const T value = *static_cast<T*>(lanes[i]);
          total = first ? value : F{}(total, value);
          first = false;
        }
        for (int i = 0; i < 32; ++i) {
          if (mask >> i & 1) *static_cast<T*>(lanes[i]) = total;
        }
      },
      site);
  return value;
}

struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};

}  // namespace emulator

// Lane `source` of the lane's own part of the warp, or the lane itself where that leaves the part.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
  const unsigned first = emulator::lane() / width * width;
  return emulator::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle("__shfl_up_sync", mask, value, lane % width >= delta ? lane - delta : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle("__shfl_down_sync", mask, value,
                           lane % width + delta < unsigned(width) ? lane + delta : lane, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATOR_SITE) {
  const unsigned lane = emulator::lane(), other = lane ^ lanes;
  return emulator::shuffle("__shfl_xor_sync", mask, value, other / width > lane / width ? lane : other, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  const unsigned bit = predicate ? 1u << emulator::lane() : 0;
  return emulator::reduce("__ballot_sync", mask, bit, std::bit_or<unsigned>{}, site);
}
inline int __any_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::reduce("__any_sync", mask, predicate != 0, std::logical_or<bool>{}, site);
}
inline int __all_sync(unsigned mask, int predicate, EMULATOR_SITE) {
  return emulator::reduce("__all_sync", mask, predicate != 0, std::logical_and<bool>{}, site);
}

#if __CUDA_ARCH__ >= 800
#define EMULATOR_REDUCE(name, F)                                                            \
  template <class T>                                                                        \
  T name(unsigned mask, T value, EMULATOR_SITE) {                                           \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, #name " is of 32-bit integers"); \
    return emulator::reduce(#name, mask, value, F{}, site);                                 \
  }
EMULATOR_REDUCE(__reduce_add_sync, std::plus<T>)
EMULATOR_REDUCE(__reduce_min_sync, emulator::Minimum)
EMULATOR_REDUCE(__reduce_max_sync, emulator::Maximum)
EMULATOR_REDUCE(__reduce_and_sync, std::bit_and<T>)
EMULATOR_REDUCE(__reduce_or_sync, std::bit_or<T>)
EMULATOR_REDUCE(__reduce_xor_sync, std::bit_xor<T>)
#undef EMULATOR_REDUCE
#endif

// Atomic operations; each returns what was there before.

namespace emulator {

template <class T, class F>
T atomic(T* address, F change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using Word = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  Word* const word = reinterpret_cast<Word*>(address);
  before_atomic(address);
  Word before = __atomic_load_n(word, __ATOMIC_RELAXED), after;
  T old;
  do {
    std::memcpy(&old, &before, sizeof old);
    const T changed = change(old);
    std::memcpy(&after, &changed, sizeof after);
  } while (!__atomic_compare_exchange_n(word, &before, after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  after_atomic(address);
  return old;
}

}  // namespace emulator

#define EMULATOR_ATOMIC(name, expression)                                     \
  template <class T>                                                          \
  T name(T* address, std::common_type_t<T> value) {                           \
    return emulator::atomic(address, [=](T old) -> T { return expression; }); \
  }
EMULATOR_ATOMIC(atomicAdd, old + value)
EMULATOR_ATOMIC(atomicSub, old - value)
EMULATOR_ATOMIC(atomicMin, std::min(old, value))
EMULATOR_ATOMIC(atomicMax, std::max(old, value))
EMULATOR_ATOMIC(atomicAnd, old& value)
EMULATOR_ATOMIC(atomicOr, old | value)
EMULATOR_ATOMIC(atomicXor, old ^ value)
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef EMULATOR_ATOMIC
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return emulator::atomic(address, [=](T old) { return old == compare ? value : old; });
}

// Loads and stores with a cache hint

#define EMULATOR_LOAD(name)                                     \
  template <class T>                                            \
  T name(const T* address, EMULATOR_SITE) {                     \
    emulator::require_aligned(address, sizeof(T), #name, site); \
    return *address;                                            \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#undef EMULATOR_LOAD
#define EMULATOR_STORE(name)                                          \
  template <class T>                                                  \
  void name(T* address, std::common_type_t<T> value, EMULATOR_SITE) { \
    emulator::require_aligned(address, sizeof(T), #name, site);       \
    *address = value;                                                 \
  }
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

// Arithmetic

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));
  return T(a) < T(b) ? T(a) : T(b);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) > T(b) ? T(a) : T(b);
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp2(x * 1.4426950408889634f); }
inline float __exp10f(float x) { return std::exp2(x * 3.321928094887362f); }
inline float __logf(float x) { return std::log2(x) * 0.6931471805599453f; }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return std::fabs(y) > 0x1p126f && std::isfinite(y) ? 0 * x : x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1 / std::sqrt(double{x})); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }

#define EMULATOR_BITS(name, From, To)        \
  inline To name(From value) {               \
    To bits;                                 \
    std::memcpy(&bits, &value, sizeof bits); \
    return bits;                             \
  }
EMULATOR_BITS(__float_as_uint, float, unsigned)
EMULATOR_BITS(__uint_as_float, unsigned, float)
EMULATOR_BITS(__float_as_int, float, int)
EMULATOR_BITS(__int_as_float, int, float)
EMULATOR_BITS(__double_as_longlong, double, long long)
EMULATOR_BITS(__longlong_as_double, long long, double)
#undef EMULATOR_BITS
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return std::uint64_t{x} * y >> 32; }
[[noreturn]] inline void __trap(EMULATOR_SITE) { emulator::fail(site, "__trap"); }

#include "cuda_runtime_api.h"
