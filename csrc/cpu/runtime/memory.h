// Memory for results and workspaces. The system clears fresh pages at their first write, which takes as long as writing
// them. Therefore large memory is kept here when it is freed, for the next allocation that it fits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace icsd::cpu {

// Smaller allocations are left to malloc, which does not return them to the system.
constexpr std::size_t kLargeBytes = std::size_t{4} << 20;

// Uninitialized memory, aligned to a cache line; from kLargeBytes on, whole large pages. The memory that is kept and in
// use is never more than the most that was in use at once, and the system may take back what is kept when memory is
// short. Throws std::bad_alloc.
class Allocation {
 public:
  explicit Allocation(std::size_t bytes);
  Allocation(Allocation&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Allocation& operator=(Allocation&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Allocation();

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_;
  std::size_t bytes_;
};

// Returns all memory that is kept to the system.
void empty_cache();

// An uninitialized array.
template <class C>
class Buffer {
 public:
  explicit Buffer(std::int64_t elements) : memory_(elements * sizeof(C)) {}
  C* data() { return static_cast<C*>(memory_.data()); }
  const C* data() const { return static_cast<const C*>(memory_.data()); }

 private:
  Allocation memory_;
};

}  // namespace icsd::cpu
