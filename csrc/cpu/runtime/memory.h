// Memory for results and for workspace. The system clears fresh pages at their first write, which takes as long as
// writing them: what is large and freed is kept here for the next that it fits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace icsd::cpu {

// Below this, malloc does as well.
constexpr std::size_t kLargeBytes = std::size_t{4} << 20;

// Bytes on whole cache lines, without a value; from kLargeBytes on, whole large pages. What is kept and what is in use
// never exceed the most that was in use at once, and the system may take back what is kept when memory is short.
// Throws std::bad_alloc.
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

// Gives the system back what is kept.
void empty_cache();

// Elements of such memory.
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
