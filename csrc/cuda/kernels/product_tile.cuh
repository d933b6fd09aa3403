// Tiles of kRows x kColumns elements of a product of operands in shared memory, computed by fused multiply-adds or by
// tensor cores, in float64 too, behind the same interface. Operands come in chunks: `left` (kRows, kDepth) or its
// transpose, `right` (kDepth, kColumns).
#pragma once

#include "cuda/kernels/compensated.cuh"
#include "cuda/kernels/tensor_cores.cuh"

namespace icsd::cuda {

constexpr int kTileColumns = 64;

// True for devices that multiply float64 matrices at full rate: sm_80, sm_90 and sm_100. Compilers for some of the
// others make hundreds of instructions of each product.
#if __CUDA_ARCH__ >= 800
constexpr bool kFastDouble = __CUDA_ARCH__ % 100 == 0 && __CUDA_ARCH__ <= 1000;
#else
constexpr bool kFastDouble = false;
#endif

// Long sums of products of type C, which are stored in that type at last.
template <class C>
using LongSum = std::conditional_t<std::is_same_v<C, double> || kFastDouble, double, CompensatedSum<float>>;

// Each thread computes 4 x 4 elements, 16 apart. The sum of a chunk is made separately and then added.
template <class C_, bool kLeftByRows>
struct FmaTile {
  using C = C_;
  static constexpr int kThreads = 256, kRows = 64, kColumns = kTileColumns, kDepth = 16, kElements = 16;
  static constexpr int kSplits = 1;
  C sums[4][4] = {};

  __device__ void multiply(const C* left, int left_pitch, const C* right, int right_pitch) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    C chunk[4][4] = {};
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      C u[4], v[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        u[m] = kLeftByRows ? left[(ty + 16 * m) * left_pitch + k] : left[k * left_pitch + ty + 16 * m];
        v[m] = right[k * right_pitch + tx + 16 * m];
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) chunk[m][n] += u[m] * v[n];
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) sums[m][n] += chunk[m][n];
    }
  }

  // Adds this thread's sums to `totals` and clears them.
  template <class Sum>
  __device__ void drain(Sum (&totals)[kElements]) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        totals[4 * m + n] += sums[m][n];
        sums[m][n] = 0;
      }
    }
  }

  template <class Sum>
  static __device__ void store(C* to, int pitch, const Sum (&totals)[kElements]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) to[(ty + 16 * m) * pitch + tx + 16 * n] = static_cast<C>(totals[4 * m + n]);
    }
  }
};

// `kSplits` groups of warps compute the same tile, each from its part of a chunk.
template <int kColumns_, int kSplits_>
struct TensorShape {
  using C = float;
  static constexpr int kRows = 64, kColumns = kColumns_, kElements = 32, kSplits = kSplits_, kDepth = kSplits * 32;
  static constexpr int kSplitThreads = kRows * kColumns / kElements, kThreads = kSplits * kSplitThreads;
};

#if __CUDA_ARCH__ >= 800

// The tile of `FmaTile` in float64, by tensor cores. Each warp computes 16 x 32 elements.
template <bool kLeftByRows>
struct DoubleTile {
  using Shape = FmaTile<double, kLeftByRows>;
  static constexpr int kElements = Shape::kElements;
  double sums[2][4][2] = {};

  // Returns the row of the lane's elements, and the first column of eight.
  static __device__ int row(int m) { return threadIdx.x / 64 * 16 + 8 * m + threadIdx.x % 32 / 4; }
  static __device__ int column(int n) { return threadIdx.x / 32 % 2 * 32 + 8 * n; }

  __device__ void multiply(const double* left, int left_pitch, const double* right, int right_pitch) {
#pragma unroll
    for (int first = 0; first < Shape::kDepth; first += 4) {
      const int k = first + threadIdx.x % 4;
      double u[2], v[4];
#pragma unroll
      for (int m = 0; m < 2; ++m) u[m] = kLeftByRows ? left[row(m) * left_pitch + k] : left[k * left_pitch + row(m)];
#pragma unroll
      for (int n = 0; n < 4; ++n) v[n] = right[k * right_pitch + column(n) + threadIdx.x % 32 / 4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply_tile(sums[m][n], u[m], v[n]);
      }
    }
  }

  __device__ void drain(double (&totals)[kElements]) {
    for_each_index([&](int m, int n, int e, int number) {
      totals[number] += sums[m][n][e];
      sums[m][n][e] = 0;
    });
  }

  static __device__ void store(double* to, int pitch, const double (&totals)[kElements]) {
    for_each_index([&](int m, int n, int e, int number) {
      to[row(m) * pitch + column(n) + threadIdx.x % 4 * 2 + e] = totals[number];
    });
  }

 private:
  template <class Call>
  static __device__ void for_each_index(const Call& call) {
#pragma unroll
    for (int number = 0; number < kElements; ++number) call(number / 8, number / 2 % 4, number % 2, number);
  }
};

// Each warp computes 32 x 32 elements from its part of a chunk. 16-bit elements need no split into two numbers: tf32
// represents them exactly.
template <class Shape, bool kLeftByRows, bool kSplitLeft>
struct TensorTile {
  static constexpr int kElements = Shape::kElements, kPart = Shape::kDepth / Shape::kSplits;
  static constexpr Order kLeftOrder = kLeftByRows ? Order::along_k : Order::across_k;
  static constexpr Split kSplitOfLeft = kSplitLeft ? Split::in_registers : Split::none;
  using Product = TileSums<float, 2, 2, kLeftOrder, Order::across_k, kSplitOfLeft, Split::in_registers, true>;
  static_assert(Product::kElements == kElements);
  Product product;

  static __device__ int row() { return threadIdx.x % Shape::kSplitThreads / Shape::kColumns * 32; }
  static __device__ int column() { return threadIdx.x % Shape::kColumns / 32 * 32; }

  __device__ void multiply(const float* left, int left_pitch, const float* right, int right_pitch) {
    const int first = threadIdx.x / Shape::kSplitThreads * kPart;
    left += (kLeftByRows ? row() * left_pitch : row()) + first * (kLeftByRows ? 1 : left_pitch);
    right += first * right_pitch + column();
#pragma unroll(kLeftByRows ? 2 : 1)
    for (int k = 0; k < kPart; k += Operand<float>::kStep) {
      product.multiply(left + k * (kLeftByRows ? 1 : left_pitch), left_pitch, right + k * right_pitch, right_pitch);
    }
    product.flush();
  }

  template <class Sum>
  __device__ void drain(Sum (&totals)[kElements]) {
    product.add_low();
    Product::for_each_index([&](int m, int n, int k) { totals[(4 * m + n) * 4 + k] += product.sums[m][n][k]; });
    product.clear();
  }

  template <class Sum>
  static __device__ void store(float* to, int pitch, const Sum (&totals)[kElements]) {
    float* const corner = to + row() * pitch + column();
    Product::for_each_index([&](int m, int n, int k) {
      corner[Product::row(m, k) * pitch + Product::column(n, k)] = static_cast<float>(totals[(4 * m + n) * 4 + k]);
    });
  }
};

// The tile of products of type C in kernels for any type and device.
template <class C, bool kLeftByRows>
using AnyTile =
    std::conditional_t<std::is_same_v<C, double> && kFastDouble, DoubleTile<kLeftByRows>, FmaTile<C, kLeftByRows>>;

#else

template <class C, bool kLeftByRows>
using AnyTile = FmaTile<C, kLeftByRows>;

#endif

}  // namespace icsd::cuda
