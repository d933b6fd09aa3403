// The kernels that are compiled once for each instruction set, and their table.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "cpu/kernels/bank_kernels.h"
#include "cpu/kernels/products.h"
#include "cpu/kernels/row_kernels.h"

namespace icsd::cpu {

// Memory that is needed after a kernel, which fetches it into the cache while it multiplies.
struct Ahead {
  struct Rectangle {
    const void* data;
    std::int64_t row_bytes, rows, bytes;  // from row to row; rows; bytes of a row
  };
  static constexpr int kParts = 3;
  static constexpr std::int64_t kMostBytes = 512 << 10;  // of a part, which has to stay in the cache
  Rectangle parts[kParts];                               // of no rows if nothing is known to be needed

  // Sets a part, or as many bytes of each row as may be fetched.
  void set(int part, const void* data, std::int64_t row_bytes, std::int64_t rows, std::int64_t bytes) {
    parts[part] = {data, row_bytes, rows, rows * bytes <= kMostBytes ? bytes : kMostBytes / rows};
  }
};

// gram_ij += <x_i, x_j> over `dim` features, for the rows [row_begin, row_end) of the lower triangle and the columns
// [column_begin, column_end); register tiles on the diagonal may add to a few elements above it.
struct GramBlock {
  std::int64_t row_begin, row_end, column_begin, column_end;
};
using GramKernel = void (*)(const void* x, std::int64_t sample_stride, std::int64_t dim, GramBlock block, double* gram,
                            std::int64_t gram_stride, const Ahead& ahead);

// Writes the sums of a block to a symmetric matrix, on both sides of its diagonal. Sums above it are not read.
template <class C>
using PutKernel = void (*)(const double* sums, std::int64_t sums_stride, GramBlock block, C* matrix,
                           std::int64_t row_stride);

// out_i = scale_i Σ_j matrix_ij x_j over `dim` features, the (outputs x samples) matrix as `pack` lays it out.
using CombineKernel = void (*)(const void* packed, const double* scale, const void* x, std::int64_t sample_stride,
                               std::int64_t samples, std::int64_t dim, void* out, std::int64_t out_stride,
                               std::int64_t outputs, const Ahead& ahead);

// Packs a row-major matrix for CombineKernel: blocks of rows, each block column by column, in compute type. A call
// packs one of `parts` equal parts.
template <class C>
using PackKernel = void (*)(const C* matrix, std::int64_t row_stride, std::int64_t outputs, std::int64_t samples,
                            std::int64_t part, std::int64_t parts, void* packed);

// The same for bfloat16 features and a square matrix whose elements off the diagonal are bfloat16 numbers. It is twice
// as fast on a processor that multiplies bfloat16.
struct NarrowKernels {
  // Returns the bytes of a packed matrix.
  std::int64_t (*bytes)(std::int64_t samples);
  // Returns false if the matrix is not of this kind. `rest` receives the diagonal less its nearest bfloat16 numbers.
  bool (*pack)(const float* matrix, std::int64_t row_stride, std::int64_t samples, void* packed, float* rest);
  void (*combine)(const void* packed, const float* rest, const double* scale, const bfloat16* x,
                  std::int64_t sample_stride, std::int64_t samples, std::int64_t dim, bfloat16* out,
                  std::int64_t out_stride, const Ahead& ahead);
};

struct Kernels {
  const char* isa;
  const GramKernel* gram;  // these four have one for each DType
  const CombineKernel* combine;
  const PackKernel<float>* pack_float;
  const PackKernel<double>* pack_double;
  const PutKernel<float>* put_float;
  const PutKernel<double>* put_double;
  const AllRowKernels<float>* rows_float;
  const AllRowKernels<double>* rows_double;
  const ProductKernels<float>* products_float;
  const ProductKernels<double>* products_double;
  const BankKernels<float>* banks_float;
  const BankKernels<double>* banks_double;
  const NarrowKernels* narrow;  // null where the processor does not multiply bfloat16

  template <class C>
  PackKernel<C> pack(DType dtype) const {
    if constexpr (sizeof(C) == 8) {
      return pack_double[static_cast<int>(dtype)];
    } else {
      return pack_float[static_cast<int>(dtype)];
    }
  }
  template <class C>
  PutKernel<C> put() const {
    if constexpr (sizeof(C) == 8) {
      return *put_double;
    } else {
      return *put_float;
    }
  }
  template <class C>
  const AllRowKernels<C>& rows() const {
    if constexpr (sizeof(C) == 8) {
      return *rows_double;
    } else {
      return *rows_float;
    }
  }
  template <class C>
  const ProductKernels<C>& products() const {
    if constexpr (sizeof(C) == 8) {
      return *products_double;
    } else {
      return *products_float;
    }
  }
  template <class C>
  const BankKernels<C>& banks() const {
    if constexpr (sizeof(C) == 8) {
      return *banks_double;
    } else {
      return *banks_float;
    }
  }
};

namespace portable {
extern const Kernels kernels;
}
#if defined(ICSD_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

// Returns the kernels for the best instruction set of this processor, or for the one that ICSD_CPU_ISA names. Throws
// std::invalid_argument.
const Kernels& kernels();

}  // namespace icsd::cpu
