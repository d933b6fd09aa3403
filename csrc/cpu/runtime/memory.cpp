#include "cpu/runtime/memory.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

namespace icsd::cpu {
namespace {

constexpr std::size_t kLargePage = std::size_t{2} << 20;
constexpr std::align_val_t kLine{64};

std::size_t whole_pages(std::size_t bytes) { return (bytes + kLargePage - 1) / kLargePage * kLargePage; }

struct Pages {
  void* data;
  std::size_t bytes;
};

// The large allocations of this process.
class Pool {
 public:
  Pages take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Pages pages = take_kept(bytes);
    if (!pages.data) pages = map(bytes);
    in_use_ += pages.bytes;
    most_ = std::max(most_, in_use_);
    unmap_above(most_);
    return pages;
  }

  void give(Pages pages) {
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= pages.bytes;
    kept_bytes_ += pages.bytes;
    kept_.push_back(pages);
#if defined(MADV_FREE)
    madvise(pages.data, pages.bytes, MADV_FREE);
#endif
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    unmap_above(in_use_);
  }

  std::mutex& mutex() { return mutex_; }

 private:
  // Takes the smallest kept memory that wastes at most a quarter, of several the last freed. Null if there is none.
  Pages take_kept(std::size_t bytes) {
    auto best = kept_.end();
    for (auto pages = kept_.begin(); pages != kept_.end(); ++pages) {
      const bool fits = pages->bytes >= bytes && pages->bytes - bytes <= bytes / 4;
      if (fits && (best == kept_.end() || pages->bytes <= best->bytes)) best = pages;
    }
    if (best == kept_.end()) return {nullptr, 0};
    const Pages pages = *best;
    kept_.erase(best);
    kept_bytes_ -= pages.bytes;
    return pages;
  }

  // Maps fresh pages that begin on a large page.
  Pages map(std::size_t bytes) {
    const std::size_t with_margin = bytes + kLargePage;
    void* mapped = mmap(nullptr, with_margin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED && !kept_.empty()) {
      unmap_above(in_use_);
      mapped = mmap(nullptr, with_margin, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    }
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    char* const begin = static_cast<char*>(mapped);
    const std::size_t before =
        whole_pages(reinterpret_cast<std::uintptr_t>(begin)) - reinterpret_cast<std::uintptr_t>(begin);
    if (before) munmap(begin, before);
    munmap(begin + before + bytes, kLargePage - before);
#if defined(MADV_HUGEPAGE)
    madvise(begin + before, bytes, MADV_HUGEPAGE);  // may fail
#endif
    return {begin + before, bytes};
  }

  // Unmaps what was kept longest until no more than `bytes` are kept and in use.
  void unmap_above(std::size_t bytes) {
    auto pages = kept_.begin();
    for (; pages != kept_.end() && in_use_ + kept_bytes_ > bytes; ++pages) {
      munmap(pages->data, pages->bytes);
      kept_bytes_ -= pages->bytes;
    }
    kept_.erase(kept_.begin(), pages);
  }

  std::mutex mutex_;
  std::vector<Pages> kept_;  // in the order in which they were freed
  std::size_t kept_bytes_ = 0, in_use_ = 0, most_ = 0;
};

// It is never destroyed: tensors may be freed after everything else.
Pool& pool() {
  static Pool* const one = new Pool;
  return *one;
}

// While a process forks, no other thread holds the lock: the child could never take it.
[[maybe_unused]] const int hold_in_forks =
    pthread_atfork([] { pool().mutex().lock(); }, [] { pool().mutex().unlock(); }, [] { pool().mutex().unlock(); });

}  // namespace

void empty_cache() { pool().empty(); }

Allocation::Allocation(std::size_t bytes) : data_(nullptr), bytes_(bytes) {
  if (bytes >= kLargeBytes) {
    const Pages pages = pool().take(whole_pages(bytes));
    data_ = pages.data;
    bytes_ = pages.bytes;
  } else if (bytes) {
    data_ = ::operator new(bytes, kLine);
  }
}

Allocation::~Allocation() {
  if (bytes_ >= kLargeBytes) {
    pool().give({data_, bytes_});
  } else {
    ::operator delete(data_, kLine);
  }
}

}  // namespace icsd::cpu
