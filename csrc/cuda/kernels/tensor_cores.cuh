// Tensor-core products of 16 x 16 tiles of a warp, as accurate as fused multiply-adds in float32.
//
// A float32 number is split into two tf32 numbers, high + low. The product of two low numbers, 2^-22 of the whole, is
// left out. Tensor cores truncate as they add, so they sum only a few products; these sums are then added in float32.
#pragma once

#include <mma.h>

#include "cuda/runtime/element.cuh"

namespace icsd::cuda {

constexpr int kTile = 16;  // rows and columns of a tensor-core tile

#if __CUDA_ARCH__ >= 800

namespace wmma = nvcuda::wmma;

// The type in which elements of shared memory are multiplied, and the depth of one product.
template <class S>
struct Operand {
  using type = S;
  static constexpr int kStep = 16;
};
template <>
struct Operand<float> {
  using type = wmma::precision::tf32;
  static constexpr int kStep = 8;
};

// A tile of an operand. For float32, `high` has the part that tf32 can represent and, if split, `low` has the rest.
template <class Use, class S, class Layout, bool kSplit>
struct OperandTile {
  wmma::fragment<Use, kTile, kTile, Operand<S>::kStep, typename Operand<S>::type, Layout> high, low;

  __device__ void load(const S* from, int pitch) {
    wmma::load_matrix_sync(high, from, pitch);
    if constexpr (kSplit) {
#pragma unroll
      for (int k = 0; k < high.num_elements; ++k) {
        const float whole = high.x[k];
        high.x[k] = wmma::__float_to_tf32(whole);
        low.x[k] = wmma::__float_to_tf32(whole - high.x[k]);
      }
    }
  }
};

// Sums of kRows x kColumns tiles of a b. The layout of a (rows, k) is LayoutA, that of b (k, columns) is Layout.
template <class S, int kRows, int kColumns, class Layout, bool kSplitA, bool kSplitB, class LayoutA = wmma::row_major>
struct TileSums {
  using Sum = wmma::fragment<wmma::accumulator, kTile, kTile, Operand<S>::kStep, float>;
  Sum sums[kRows][kColumns], short_sums[kRows][kColumns];

  __device__ TileSums() { clear(); }

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        wmma::fill_fragment(sums[m][n], 0.f);
        wmma::fill_fragment(short_sums[m][n], 0.f);
      }
    }
  }

  // Adds the products of one step along k to the short sums.
  __device__ void multiply(const S* a, int a_pitch, const S* b, int b_pitch) {
    constexpr bool by_rows = std::is_same_v<Layout, wmma::row_major>,
                   a_by_rows = std::is_same_v<LayoutA, wmma::row_major>;
    OperandTile<wmma::matrix_b, S, Layout, kSplitB> columns[kColumns];
#pragma unroll
    for (int n = 0; n < kColumns; ++n) columns[n].load(b + n * kTile * (by_rows ? 1 : b_pitch), b_pitch);
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      OperandTile<wmma::matrix_a, S, LayoutA, kSplitA> row;
      row.load(a + m * kTile * (a_by_rows ? a_pitch : 1), a_pitch);
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        Sum& sum = short_sums[m][n];
        if constexpr (kSplitA) wmma::mma_sync(sum, row.low, columns[n].high, sum);
        if constexpr (kSplitB) wmma::mma_sync(sum, row.high, columns[n].low, sum);
        wmma::mma_sync(sum, row.high, columns[n].high, sum);
      }
    }
  }

  // Adds the short sums to the sums and clears them.
  __device__ void flush() {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int k = 0; k < sums[m][n].num_elements; ++k) sums[m][n].x[k] += short_sums[m][n].x[k];
        wmma::fill_fragment(short_sums[m][n], 0.f);
      }
    }
  }

  template <class Call>
  __device__ void for_each_tile(const Call& call) const {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) call(m, n, sums[m][n]);
    }
  }

  __device__ void store(float* to, int pitch) const {
    for_each_tile([&](int m, int n, const Sum& tile) {
      wmma::store_matrix_sync(to + m * kTile * pitch + n * kTile, tile, pitch, wmma::mem_row_major);
    });
  }
};

#endif

}  // namespace icsd::cuda
