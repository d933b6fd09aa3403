// Counts the bytes that kernels read and write. Built with -fsanitize=thread but without ThreadSanitizer's library,
// every access of a translation unit is a call to one of these.

#include <cstddef>
#include <cstdint>
#include <vector>

namespace {

struct Watched {
  std::uintptr_t begin;
  std::size_t bytes;
  std::uint64_t read = 0, written = 0;
};
std::vector<Watched> watched;
std::vector<std::vector<Watched>> ends;  // what was counted when a launch ended

void count(const void* address, std::size_t bytes, std::uint64_t Watched::* counter) {
  for (Watched& range : watched) {
    if (reinterpret_cast<std::uintptr_t>(address) - range.begin < range.bytes) range.*counter += bytes;
  }
}

}  // namespace

extern "C" {

// Starts to count at zero; returns the number to ask for.
int emulator_watch(const void* memory, std::size_t bytes) {
  watched.push_back({reinterpret_cast<std::uintptr_t>(memory), bytes});
  return static_cast<int>(watched.size()) - 1;
}
std::uint64_t emulator_bytes_read(int range) { return watched[range].read; }
std::uint64_t emulator_bytes_written(int range) { return watched[range].written; }
// The same at the end of a launch, numbered from 0 after `emulator_unwatch`.
std::uint64_t emulator_bytes_read_until(int launch, int range) {
  return range < static_cast<int>(ends[launch].size()) ? ends[launch][range].read : 0;
}
std::uint64_t emulator_bytes_written_until(int launch, int range) {
  return range < static_cast<int>(ends[launch].size()) ? ends[launch][range].written : 0;
}
void emulator_unwatch() {
  watched.clear();
  ends.clear();
}
void emulator_launch_ended() { ends.push_back(watched); }

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_read_range(void* address, std::size_t bytes) { count(address, bytes, &Watched::read); }
void __tsan_write_range(void* address, std::size_t bytes) { count(address, bytes, &Watched::written); }

#define EMULATOR_ACCESS(bytes)                                                                \
  void __tsan_read##bytes(void* address) { count(address, bytes, &Watched::read); }           \
  void __tsan_write##bytes(void* address) { count(address, bytes, &Watched::written); }       \
  void __tsan_unaligned_read##bytes(void* address) { count(address, bytes, &Watched::read); } \
  void __tsan_unaligned_write##bytes(void* address) { count(address, bytes, &Watched::written); }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)

#define EMULATOR_UPDATE(bits, T, name, operation)                     \
  T __tsan_atomic##bits##_##name(volatile T* address, T value, int) { \
    count(const_cast<T*>(address), sizeof(T), &Watched::read);        \
    count(const_cast<T*>(address), sizeof(T), &Watched::written);     \
    return operation(address, value, __ATOMIC_SEQ_CST);               \
  }
#define EMULATOR_ATOMICS(bits, T)                                                                                     \
  T __tsan_atomic##bits##_load(const volatile T* address, int) {                                                      \
    count(const_cast<T*>(address), sizeof(T), &Watched::read);                                                        \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                                \
  }                                                                                                                   \
  void __tsan_atomic##bits##_store(volatile T* address, T value, int) {                                               \
    count(const_cast<T*>(address), sizeof(T), &Watched::written);                                                     \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* address, T* expected, T value, int, int) {            \
    count(const_cast<T*>(address), sizeof(T), &Watched::read);                                                        \
    count(const_cast<T*>(address), sizeof(T), &Watched::written);                                                     \
    return __atomic_compare_exchange_n(address, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);          \
  }                                                                                                                   \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* address, T* expected, T value, int success, int fail) { \
    return __tsan_atomic##bits##_compare_exchange_strong(address, expected, value, success, fail);                    \
  }                                                                                                                   \
  EMULATOR_UPDATE(bits, T, exchange, __atomic_exchange_n)                                                             \
  EMULATOR_UPDATE(bits, T, fetch_add, __atomic_fetch_add)                                                             \
  EMULATOR_UPDATE(bits, T, fetch_sub, __atomic_fetch_sub)                                                             \
  EMULATOR_UPDATE(bits, T, fetch_and, __atomic_fetch_and)                                                             \
  EMULATOR_UPDATE(bits, T, fetch_or, __atomic_fetch_or)                                                               \
  EMULATOR_UPDATE(bits, T, fetch_xor, __atomic_fetch_xor)
EMULATOR_ATOMICS(8, std::uint8_t)
EMULATOR_ATOMICS(16, std::uint16_t)
EMULATOR_ATOMICS(32, std::uint32_t)
EMULATOR_ATOMICS(64, std::uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
}
