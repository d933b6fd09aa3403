// Asynchronous copies that land as late as they may.
#pragma once

#include "emulator.h"

namespace emulator {

// Plain loads and stores, for what counts and checks accesses to see.
inline void land(const Copy& copy) {
  const std::size_t copied = copy.bytes - copy.zeros;
  const std::size_t step = copied % 4 ? 1 : 4;
  for (std::size_t i = 0; i < copy.bytes; i += step) {
    char* to = static_cast<char*>(copy.to) + i;
    const char* from = static_cast<const char*>(copy.from) + i;
    if (step == 4) {
      *reinterpret_cast<std::uint32_t*>(to) = i < copied ? *reinterpret_cast<const std::uint32_t*>(from) : 0;
    } else {
      *to = i < copied ? *from : 0;
    }
  }
}

}  // namespace emulator

inline void __pipeline_memcpy_async(void* shared, const void* global, std::size_t bytes, std::size_t zfill = 0,
                                    EMULATOR_SITE) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) || zfill > bytes) {
    emulator::fail(site, "__pipeline_memcpy_async: %zu bytes, %zu of them zero; sizes are 4, 8 and 16", bytes, zfill);
  }
  emulator::require_aligned(shared, bytes, "__pipeline_memcpy_async", site);
  emulator::require_aligned(global, bytes, "__pipeline_memcpy_async", site);
  if (!emulator::is_shared(shared) || emulator::is_shared(global)) {
    emulator::fail(site, "__pipeline_memcpy_async: copies go from global to shared memory");
  }
  for (std::size_t i = 0; i < bytes; i += 4) {
    *reinterpret_cast<std::uint32_t*>(static_cast<char*>(shared) + i) = 0xffffffff;  // NaN in every type
  }
  emulator::pipeline().open.push_back({shared, global, bytes, zfill});
}

inline void __pipeline_commit() {
  emulator::Pipeline& pipeline = emulator::pipeline();
  pipeline.committed.push_back(std::move(pipeline.open));
  pipeline.open.clear();
}

inline void __pipeline_wait_prior(std::size_t batches) {
  auto& committed = emulator::pipeline().committed;
  if (committed.size() <= batches) return;
  const auto first_pending = committed.end() - batches;
  for (auto batch = committed.begin(); batch != first_pending; ++batch) {
    for (const emulator::Copy& copy : *batch) emulator::land(copy);
  }
  committed.erase(committed.begin(), first_pending);
}
