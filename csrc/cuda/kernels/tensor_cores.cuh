// Tensor-core products of tiles of a warp, as accurate as fused multiply-adds in float32.
//
// A float32 number is split into two tf32 numbers, high + low. The product of two low numbers, 2^-22 of the whole, is
// left out. Tensor cores truncate as they add, so they sum only a few products; these sums are then added in float32.
//
// Tensor cores cut off what tf32 does not represent, too. Of a low number that is 1/3072 on average: between a third
// and two thirds of its last place in tf32. So either the low numbers or the sums of their products are enlarged by
// that much.
#pragma once

#include "cuda/runtime/matrix_instructions.cuh"

namespace icsd::cuda {

constexpr int kTile = 16;  // rows and columns of a tensor-core tile

// The order of the elements of an operand in shared memory. Products are sums over k.
enum class Order {
  along_k,   // those of a row or column of the product are neighbors
  across_k,  // those of a k are neighbors
};

#if __CUDA_ARCH__ >= 800

// The type in which elements of shared memory are multiplied, and the depth of one product.
template <class S>
struct Operand {
  using type = S;
  static constexpr int kStep = 16;
};
template <>
struct Operand<float> {
  using type = Tf32;
  static constexpr int kStep = 8;
};

constexpr float kGrowth = 1 + 1.0f / 3072;

// Splits a number into two, the first of them rounded to tf32. The second one is enlarged if `kGrow`; to add half of
// its last place to its bits, as for the first one, would lose a NaN of all ones.
template <bool kGrow>
__device__ inline void split_number(unsigned whole, unsigned& high, unsigned& low) {
  high = (whole + 0x1000) & 0xffffe000;
  const float rest = __uint_as_float(whole) - __uint_as_float(high);
  low = __float_as_uint(kGrow ? kGrowth * rest : rest);
}

// The way an operand becomes two: not at all, in registers, or in memory, where the second is a given distance from
// the first.
enum class Split { none, in_registers, in_memory };

// One step along k of an operand of 16 kTiles rows (of the left operand) or columns (of the right one).
//
// The words of a tile of the left operand are those of one instruction: word h + 2 u has half h of its rows and half u
// of its k. Those of the right operand are in pairs, one for each half of the columns, since an instruction takes 8.
template <class S, bool kLeft, Order kOrder, int kTiles, Split kSplit, bool kGrow>
struct OperandTiles {
  // True if the rows of two tiles are dealt out so that a lane loads four at once: float32 cannot be transposed.
  static constexpr bool kWide = kOrder == Order::across_k && std::is_same_v<S, float>;
  static_assert(!kWide || kTiles == 2, "a lane loads the rows of two tiles");
  static_assert(kLeft || kSplit != Split::in_memory, "only the left operand is split in memory");
  unsigned high[kTiles][4], low[kTiles][4];

  // Returns the row of memory that is row `index` of a half of a tile.
  static __device__ int place(int tile, int half, int index) {
    return kWide ? 4 * index + 2 * tile + half : kTile * tile + 8 * half + index;
  }

  // The other number of a split in memory is `rest` elements after the first.
  __device__ void load(const S* from, int pitch, int rest = 0) {
    load_words(high, from, pitch);
    if constexpr (kSplit == Split::in_memory) load_words(low, from + rest, pitch);
    if constexpr (kSplit == Split::in_registers) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int k = 0; k < 4; ++k) split_number<kGrow>(high[tile][k], high[tile][k], low[tile][k]);
      }
    }
  }

 private:
  static __device__ void load_words(unsigned (&words)[kTiles][4], const S* from, int pitch) {
    const int lane = threadIdx.x % 32;
    if constexpr (kWide) {
      const S* const first = from + lane % 4 * pitch + lane / 4 * 4;
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of k
        const auto x = *reinterpret_cast<const Vector<float>*>(first + 4 * half * pitch);
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          words[row / 2][kLeft ? row % 2 + 2 * half : row % 2 * 2 + half] = __float_as_uint(x.x[row]);
        }
      }
    } else {
      constexpr bool along = kOrder == Order::along_k;
      constexpr int kHalf = along ? 16 / static_cast<int>(sizeof(S)) : 8;  // of a row of memory
      const bool neighbors = kLeft == along;  // the halves of the first two matrices are those of a row of memory
      const int row = neighbors ? lane % 16 : lane % 8 + lane / 16 * 8, half = neighbors ? lane / 16 : lane / 8 % 2;
      const S* const first = from + row * pitch + half * kHalf;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        load_matrices<!along>(words[tile], first + tile * kTile * (along ? pitch : 1));
      }
    }
  }
};

// Sums of 16 kRows x 16 kColumns elements of a b, of a warp. If `kApart`, products of low numbers have sums of their
// own, which take registers but spare the low numbers their growth. They are so small that they may be long.
template <class S, int kRows, int kColumns, Order kOrderA, Order kOrderB, Split kSplitA, Split kSplitB,
          bool kApart = false>
struct TileSums {
  using A = OperandTiles<S, true, kOrderA, kRows, kSplitA, !kApart>;
  using B = OperandTiles<S, false, kOrderB, kColumns, kSplitB, !kApart>;
  using Sums = float[kRows][2 * kColumns][4];
  static constexpr int kElements = 8 * kRows * kColumns;  // of a lane
  Sums sums, short_sums, low_sums;

  __device__ TileSums() { clear(); }

  __device__ void clear() {
    for_each_index([&](int m, int n, int k) { sums[m][n][k] = short_sums[m][n][k] = low_sums[m][n][k] = 0; });
  }

  // Adds the products of one step along k to the short sums. If `a` is split in memory, `rest` is the distance.
  __device__ void multiply(const S* a, int a_pitch, const S* b, int b_pitch, int rest = 0) {
    B columns;
    columns.load(b, b_pitch);
    A rows;
    rows.load(a, a_pitch, rest);
    if constexpr (kSplitA != Split::none) multiply_words<false>(sums_of_low(), rows.low, columns.high);
    if constexpr (kSplitB != Split::none) multiply_words<false>(sums_of_low(), rows.high, columns.low);
    multiply_words<false>(short_sums, rows.high, columns.high);
  }

  // Does the same for the product of `a` and its own transpose, without the tiles above the diagonal. Of the products
  // of low numbers, those with the left ones are summed, which are the transpose of those with the right ones.
  __device__ void multiply_own(const S* a, int a_pitch) {
    static_assert(kOrderA == kOrderB && kSplitA == kSplitB && kApart == (kSplitA == Split::in_registers));
    B columns;
    columns.load(a, a_pitch);
    A rows;
    rows.load(a, a_pitch);
    if constexpr (kApart) multiply_words<false>(low_sums, rows.low, columns.high);
    multiply_words<true>(short_sums, rows.high, columns.high);
  }

  // Adds the short sums to the sums and clears them.
  __device__ void flush() {
    for_each_index([&](int m, int n, int k) {
      sums[m][n][k] += short_sums[m][n][k];
      short_sums[m][n][k] = 0;
    });
  }

  // Adds the sums of products of low numbers to the sums, once, at the end.
  __device__ void add_low() {
    if constexpr (kApart) {
      for_each_index([&](int m, int n, int k) { sums[m][n][k] += kGrowth * low_sums[m][n][k]; });
    }
  }

  // Does the same after `multiply_own`. The transpose passes through `memory` of the warp.
  __device__ void add_low_of_own(float* memory, int pitch) {
    if constexpr (kApart) {
      for_each_index([&](int m, int n, int k) { memory[row(m, k) * pitch + column(n, k)] = low_sums[m][n][k]; });
      __syncwarp();
      for_each_index([&](int m, int n, int k) {
        sums[m][n][k] += kGrowth * (low_sums[m][n][k] + memory[column(n, k) * pitch + row(m, k)]);
      });
      __syncwarp();
    }
  }

  // Calls call(row, column, sum) for the elements of the lane.
  template <class Call>
  __device__ void for_each(const Call& call) const {
    for_each_index([&](int m, int n, int k) { call(row(m, k), column(n, k), sums[m][n][k]); });
  }

  // Calls call(m, n, k) for the indices of the lane's elements.
  template <class Call>
  static __device__ void for_each_index(const Call& call) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * kColumns; ++n) {
#pragma unroll
        for (int k = 0; k < 4; ++k) call(m, n, k);
      }
    }
  }

  // Returns the row and the column of an element of the lane.
  static __device__ int row(int m, int k) { return A::place(m, k / 2, threadIdx.x % 32 / 4); }
  static __device__ int column(int n, int k) { return B::place(n / 2, n % 2, threadIdx.x % 4 * 2 + k % 2); }

 private:
  __device__ Sums& sums_of_low() {
    if constexpr (kApart) return low_sums;
    return short_sums;
  }

  // Independent products follow each other. If `kLower`, tiles above the diagonal are left out.
  template <bool kLower>
  static __device__ void multiply_words(Sums& to, const unsigned (&a)[kRows][4], const unsigned (&b)[kColumns][4]) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < (kLower ? 2 * m + 2 : 2 * kColumns); ++n) {
        const unsigned* const pair = b[n / 2] + n % 2 * 2;
        multiply_tile(typename Operand<S>::type{}, to[m][n], a[m], pair[0], pair[1]);
      }
    }
  }
};

#endif

}  // namespace icsd::cuda
