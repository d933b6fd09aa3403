// What the headers of CUDA's names here ask of the runtime (../runtime), which no sanitizer instruments.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "vector_types.h"

namespace emulator {

// The line of device code that waits or errs.
struct Site {
  const char* file;
  int line;
};
#define EMULATOR_SITE emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// These describe the running CUDA thread.
[[gnu::pure]] const uint3& thread_index();
[[gnu::pure]] const uint3& block_index();
[[gnu::pure]] const dim3& block_size();
[[gnu::pure]] const dim3& grid_size();
[[gnu::pure]] unsigned lane();
void* dynamic_shared();
bool is_shared(const void* pointer);

// Ends the launch with an error; the rest of the grid does not run.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

inline void require_aligned(const void* pointer, std::size_t bytes, const char* what, Site site) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes) {
    fail(site, "%s: the pointer %p is not aligned to %zu bytes", what, pointer, bytes);
  }
}

// A barrier of the whole block; returns how many of its threads brought a true predicate.
unsigned block_barrier(const char* name, bool predicate, Site site);

// Waits for the other lanes of `mask`; the last to come calls complete(lanes) with the `data` of all of them, indexed
// by lane. Orders memory only if told.
using Complete = void (*)(void* const* lanes, unsigned mask);
void warp_collective(const char* name, unsigned mask, void* data, Complete complete, Site site,
                     bool orders_memory = false);

// Waits for the previous kernel, which has long finished here. A kernel that was launched early fails without it.
void wait_for_previous();

// Atomic operations order memory only together with a fence before (release) or after (acquire).
void before_atomic(const void* address);
void after_atomic(const void* address);
void fence();

// c += a b, row-major; `group` products and the accumulator at a time, truncated to float unless `group` is 0.
void tile_product(const double* a, const double* b, double* c, int rows, int columns, int depth, int group);

// Copies from global to shared memory that have been started, in the batches they were committed in.
struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, zeros;
};
struct Pipeline {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> committed;
};
Pipeline& pipeline();

}  // namespace emulator
