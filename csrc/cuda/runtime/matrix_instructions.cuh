// Instructions of the tensor cores, from sm_80 on, and the loads for them. Operands are words: a tf32 number each, or
// two numbers of 16 bits; or float64 numbers. Which lane has which element is specified in "Warp-level matrix
// instructions" of the PTX manual; the emulator follows it (tests/cuda/emulator/include/matrix_instructions.h).
#pragma once

#include "cuda/runtime/element.cuh"

#ifdef ICSD_EMULATED
#include "matrix_instructions.h"
#endif

namespace icsd::cuda {

#if __CUDA_ARCH__ >= 800

struct Tf32 {};  // names the type of a product; memory has no such elements

// Loads four matrices of 8 rows of 16 bytes from shared memory. Lane 8 q + r gives the address of row r of matrix q,
// and gets word `lane % 4` of row `lane / 4` of every matrix. If `kTranspose`, a matrix of 16-bit elements is
// transposed.
template <bool kTranspose>
__device__ inline void load_matrices(unsigned (&words)[4], const void* row) {
#ifdef ICSD_EMULATED
  emulator::load_matrices(words, row, kTranspose);
#else
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// sums += a b, where a has 16 rows and b has 8 columns. The depth is 8 for tf32 and 16 for 16-bit types.
#ifdef ICSD_EMULATED
#define ICSD_MULTIPLY(Type, kind, suffix)                                                                          \
  __device__ inline void multiply_tile(Type, float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    emulator::multiply_tile(emulator::MatrixKind::kind, sums, a, b0, b1);                                          \
  }
#else
#define ICSD_MULTIPLY(Type, kind, suffix)                                                                          \
  __device__ inline void multiply_tile(Type, float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    asm("mma.sync.aligned." suffix " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"              \
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                               \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                           \
  }
#endif
ICSD_MULTIPLY(Tf32, tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
ICSD_MULTIPLY(__nv_bfloat16, bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
ICSD_MULTIPLY(__half, float16, "m16n8k16.row.col.f32.f16.f16.f32")
#undef ICSD_MULTIPLY

// The same in float64: a has 8 rows, the depth is 4. Lane 4 g + t has element (g, t) of a and (t, g) of b, and the sums
// (g, 2 t) and (g, 2 t + 1).
__device__ inline void multiply_tile(double (&sums)[2], double a, double b) {
#ifdef ICSD_EMULATED
  emulator::multiply_tile(sums, a, b);
#else
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(sums[0]), "+d"(sums[1])
      : "d"(a), "d"(b));
#endif
}

#endif

}  // namespace icsd::cuda
