// Samples on their way into shared memory: a ring of tiles of 128 bytes of each sample, filled by asynchronous copies
// while earlier tiles are in use.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element.cuh"

namespace icsd::cuda {

constexpr int kLineBytes = 128;                // of each sample in a tile
constexpr int kPitchBytes = kLineBytes + 16;   // from sample to sample: 8 rows at a time meet all banks

template <class T>
constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPitch = kPitchBytes / static_cast<int>(sizeof(T));

// The bytes that copies of a batch may move at once: 16 where every sample begins on a multiple of 16 bytes, fewer else.
inline int copy_bytes(const void* data, std::int64_t group_stride, std::int64_t sample_stride, int itemsize) {
  const std::uint64_t all = reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uint64_t>(group_stride * itemsize) |
                            static_cast<std::uint64_t>(sample_stride * itemsize);
  if (all % 16 == 0) return 16;
  return all % 4 == 0 ? (itemsize == 8 ? 8 : 4) : itemsize;
}

// Fills rows of a tile, from `from` on, with what is left of a line of each sample; zeros follow the last feature.
template <int kBytes, class T>
__device__ void copy_lines(T* tile, const T* from, std::int64_t sample_stride, int rows, std::int64_t left) {
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T)), kCopies = kLine<T> / kElements;
  for (int item = threadIdx.x; item < rows * kCopies; item += blockDim.x) {
    const int row = item / kCopies, column = item % kCopies * kElements;
    T* const to = tile + row * kPitch<T> + column;
    const T* const x = from + row * sample_stride + column;
    if (kBytes >= 4 && column + kElements <= left) {
      if constexpr (kBytes >= 4) __pipeline_memcpy_async(to, x, kBytes);
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) to[k] = column + k < left ? x[k] : Narrow<T>::from(0.f);
    }
  }
}

template <class T>
__device__ void copy_lines(int bytes, T* tile, const T* from, std::int64_t sample_stride, int rows, std::int64_t left) {
  if (bytes == 16) {
    copy_lines<16>(tile, from, sample_stride, rows, left);
  } else if (sizeof(T) < 4 && bytes == 4) {
    copy_lines<sizeof(T) < 4 ? 4 : 16>(tile, from, sample_stride, rows, left);
  } else {
    copy_lines<static_cast<int>(sizeof(T))>(tile, from, sample_stride, rows, left);
  }
}

// Fills rows of `width` elements, `pitch` apart, with what is `left` of `samples` samples and with zeros.
template <int kBytes, class T, class S>
__device__ void copy_block(S* to, int pitch, const T* from, std::int64_t sample_stride, int samples, int rows, int width,
                           std::int64_t left) {
  constexpr int kElements = kBytes / static_cast<int>(sizeof(T));
  const int copies = width / kElements;
  for (int item = threadIdx.x; item < rows * copies; item += blockDim.x) {
    const int row = item / copies, column = item % copies * kElements;
    S* const element = to + row * pitch + column;
    const T* const x = from + row * sample_stride + column;
    const std::int64_t inside = row < samples ? left - column : 0;
    if (std::is_same_v<S, T> && kBytes >= 4 && inside >= kElements) {
      if constexpr (std::is_same_v<S, T> && kBytes >= 4) __pipeline_memcpy_async(element, x, kBytes);
    } else if (kBytes == 16 && inside >= kElements) {
      const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(x);
#pragma unroll
      for (int k = 0; k < kElements; ++k) element[k] = Narrow<S>::from(widen(vector.x[k]));
    } else {
#pragma unroll
      for (int k = 0; k < kElements; ++k) element[k] = Narrow<S>::from(k < inside ? widen(x[k]) : 0.f);
    }
  }
}

template <class T, class S>
__device__ void copy_block(int bytes, S* to, int pitch, const T* from, std::int64_t sample_stride, int samples, int rows,
                           int width, std::int64_t left) {
  if (bytes == 16) {
    copy_block<16>(to, pitch, from, sample_stride, samples, rows, width, left);
  } else {
    copy_block<static_cast<int>(sizeof(T))>(to, pitch, from, sample_stride, samples, rows, width, left);
  }
}

// The samples a block compares: one range of them with itself, or two ranges, each in `side` rows of a tile.
template <class T>
struct Panels {
  const T *first, *second;  // the first feature of the first sample
  int first_rows, second_rows;
  bool two;
  int side;
  std::int64_t sample_stride;
  int bytes;  // of `copy_bytes`

  __device__ int tile() const { return (two ? 2 : 1) * side * kPitch<T>; }

  __device__ void copy(T* tile, std::int64_t begin, std::int64_t end) const {
#pragma unroll 1
    for (int panel = 0; panel < (two ? 2 : 1); ++panel) {
      copy_lines(bytes, tile + panel * side * kPitch<T>, (panel ? second : first) + begin, sample_stride,
                 panel ? second_rows : first_rows, end - begin);
    }
  }

  // The rows without a sample, which are never copied to.
  __device__ void clear(T* tile) const {
    clear_rows(tile, first_rows);
    if (two) clear_rows(tile + side * kPitch<T>, second_rows);
  }
  __device__ void clear_rows(T* tile, int rows) const {
    for (int item = rows * kPitch<T> + threadIdx.x; item < side * kPitch<T>; item += blockDim.x) {
      tile[item] = Narrow<T>::from(0.f);
    }
  }

  // Calls consume(tile) for one line after the other of the features [begin, end). All threads of the block take part;
  // afterwards the ring is free.
  template <class Consume>
  __device__ void for_each_line(T* ring, int depth, std::int64_t begin, std::int64_t end, const Consume& consume) const {
    for (int slot = 0; slot < depth; ++slot) clear(ring + slot * tile());
    const int lines = static_cast<int>((end - begin + kLine<T> - 1) / kLine<T>);
    int slot = 0, free = 0;
#pragma unroll 1
    for (int line = 1 - depth; line < lines; ++line) {  // before line 0, the ring is filled
      if (line >= 0) {
        __pipeline_wait_prior(depth - 2);
        __syncthreads();  // this line is there for all threads, and none still reads the one before
      }
      const int ahead = line + depth - 1;
      if (ahead < lines) copy(ring + free * tile(), begin + static_cast<std::int64_t>(ahead) * kLine<T>, end);
      __pipeline_commit();
      free = free + 1 == depth ? 0 : free + 1;
      if (line < 0) continue;
      consume(ring + slot * tile());
      slot = slot + 1 == depth ? 0 : slot + 1;
    }
    __pipeline_wait_prior(0);
    __syncthreads();
  }
};

}  // namespace icsd::cuda
