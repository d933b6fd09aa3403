#include "cpu/runtime/threads.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace icsd::cpu {
namespace {

// The multiply-adds for which another thread is worth its cost.
constexpr std::int64_t kWorth = 1 << 19;

std::atomic<bool> forked{false};
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int threads_for(std::int64_t work) {
  if (forked || omp_in_parallel()) return 1;
  return static_cast<int>(std::clamp<std::int64_t>(work / kWorth, 1, omp_get_max_threads()));
}

}  // namespace icsd::cpu
