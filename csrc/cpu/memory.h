// Large blocks of fresh memory, which the system hands out page by page at the first write.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

#include "core/features.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace icsd::cpu {

// Blocks below this have little to gain; malloc maps those from 32 MiB on afresh each time.
constexpr std::size_t kLargeBytes = std::size_t{4} << 20;

// Asks for large pages under a block that is about to be written: handed out, they cost less than as many bytes of small ones.
inline void prefer_large_pages([[maybe_unused]] const void* data, [[maybe_unused]] std::size_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t kPage = std::uintptr_t{2} << 20;
  if (bytes < kLargeBytes) return;
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // that it may refuse
#endif
}

inline void prefer_large_pages(const Features& out, Shape shape) {
  prefer_large_pages(out.data, extent(out, shape) * size_of(out.dtype));
}

// Elements on whole cache lines, without a value.
template <class C>
class Buffer {
 public:
  explicit Buffer(std::int64_t elements)
      : data_(elements ? static_cast<C*>(::operator new(elements * sizeof(C), kLine)) : nullptr) {
    prefer_large_pages(data(), elements * sizeof(C));
  }
  C* data() { return data_.get(); }
  const C* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(C* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<C, Free> data_;
};

}  // namespace icsd::cpu
