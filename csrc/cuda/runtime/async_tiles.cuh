// Tiles of samples in shared memory, filled by asynchronous copies while earlier tiles are in use.
#pragma once

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/runtime/element.cuh"

namespace icsd::cuda {

constexpr int kLineBytes = 128;               // bytes of each sample in a tile: a line
constexpr int kPitchBytes = kLineBytes + 16;  // from sample to sample, so that 8 rows meet all banks

template <class T>
constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
template <class T>
constexpr int kPitch = kPitchBytes / static_cast<int>(sizeof(T));

// Returns how many bytes of a batch one copy may move: 16 if every sample begins at a multiple of 16 bytes, else fewer.
inline int copy_bytes(const void* data, std::int64_t group_stride, std::int64_t sample_stride, int itemsize) {
  const std::uint64_t all = reinterpret_cast<std::uintptr_t>(data) |
                            static_cast<std::uint64_t>(group_stride * itemsize) |
                            static_cast<std::uint64_t>(sample_stride * itemsize);
  if (all % 16 == 0) return 16;
  return all % 4 == 0 ? (itemsize == 8 ? 8 : 4) : itemsize;
}

// Copies one line of each of `rows` samples to a tile. `left` elements of every sample remain from `from` on; zeros
// follow the last of them.
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

// Fills `rows` rows of `width` elements, `pitch` apart, from `samples` samples with `left` elements each. Elements
// beyond the samples are zero. The copy converts if the types differ.
template <int kBytes, class T, class S>
__device__ void copy_rectangle(S* to, int pitch, const T* from, std::int64_t sample_stride, int samples, int rows,
                               int width, std::int64_t left) {
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
__device__ void copy_rectangle(int bytes, S* to, int pitch, const T* from, std::int64_t sample_stride, int samples,
                               int rows, int width, std::int64_t left) {
  if (bytes == 16) {
    copy_rectangle<16>(to, pitch, from, sample_stride, samples, rows, width, left);
  } else {
    copy_rectangle<static_cast<int>(sizeof(T))>(to, pitch, from, sample_stride, samples, rows, width, left);
  }
}

// The samples that a block compares, one range with itself or two ranges with each other, on their way through a ring
// of buffers in shared memory. Each buffer has a line of `range` samples, or of twice as many.
template <class T>
struct AsyncTiles {
  const T *first, *second;  // the first element of the first sample
  int first_rows, second_rows;
  bool two;
  int range;
  std::int64_t sample_stride;
  int bytes;  // the result of `copy_bytes`

  __device__ int size() const { return (two ? 2 : 1) * range * kPitch<T>; }

  // Copies a line of elements, `left` of which remain.
  __device__ void copy(T* buffer, std::int64_t begin, std::int64_t left) const {
#pragma unroll 1
    for (int which = 0; which < (two ? 2 : 1); ++which) {
      copy_lines(bytes, buffer + which * range * kPitch<T>, (which ? second : first) + begin, sample_stride,
                 which ? second_rows : first_rows, left);
    }
  }

  // Zeros the rows that have no sample. No copy writes to them.
  __device__ void clear(T* buffer) const {
    clear_rows(buffer, first_rows);
    if (two) clear_rows(buffer + range * kPitch<T>, second_rows);
  }
  __device__ void clear_rows(T* rows, int count) const {
    for (int item = count * kPitch<T> + threadIdx.x; item < range * kPitch<T>; item += blockDim.x) {
      rows[item] = Narrow<T>::from(0.f);
    }
  }

  // Calls consume(tile) for every line of the first `count` elements, in order. All threads of the block must call
  // this; the ring is free when it returns.
  template <class Consume>
  __device__ void for_each_line(T* ring, int buffers, std::int64_t count, const Consume& consume) const {
    for (int buffer = 0; buffer < buffers; ++buffer) clear(ring + buffer * size());
    const int lines = static_cast<int>((count + kLine<T> - 1) / kLine<T>);
    int full = 0, free = 0;
#pragma unroll 1
    for (int line = 1 - buffers; line < lines; ++line) {  // the steps before line 0 fill the ring
      if (line >= 0) {
        __pipeline_wait_prior(buffers - 2);
        __syncthreads();  // all threads see this line, and none still reads the previous one
      }
      const int ahead = line + buffers - 1;
      const std::int64_t begin = static_cast<std::int64_t>(ahead) * kLine<T>;
      if (ahead < lines) copy(ring + free * size(), begin, count - begin);
      __pipeline_commit();
      free = free + 1 == buffers ? 0 : free + 1;
      if (line < 0) continue;
      consume(ring + full * size());
      full = full + 1 == buffers ? 0 : full + 1;
    }
    __pipeline_wait_prior(0);
    __syncthreads();
  }
};

}  // namespace icsd::cuda
