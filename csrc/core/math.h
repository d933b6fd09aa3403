// The functions that losses need beyond arithmetic: for scalars here, for vectors by specialization
// (cpu/runtime/simd.h).
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define ICSD_HD __host__ __device__ inline
#else
// Inline always: files compiled for different instruction sets would share one out-of-line copy.
#define ICSD_HD inline __attribute__((always_inline))
#endif

namespace icsd {

template <class V>
struct Math {
  static ICSD_HD V exp(V x) { return std::exp(x); }
  static ICSD_HD V log(V x) { return std::log(x); }  // of positive normal numbers
  static ICSD_HD bool any(bool condition) { return condition; }
};

}  // namespace icsd
