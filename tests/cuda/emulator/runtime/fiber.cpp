#include "fiber.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "sanitizers.h"

#ifndef __x86_64__
#error "the emulator's context switch is written for x86-64"
#endif

// Saves on the running stack what a call preserves, and returns on the other stack.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr std::size_t kGuard = 4096;
constexpr std::size_t kStack = 256 << 10;
constexpr int kSavedRegisters = 6;

thread_local Fiber* resumed;

}  // namespace

Fiber::Fiber(void (*entry)(), bool own_thread) : entry_(entry) {
  void* memory =
      mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  // Neighbors without guard pages are one mapping for the kernel. A process may have 65,530 of them, which two for each
  // thread of all concurrent blocks would exceed.
  if (own_thread) mprotect(memory, kGuard, PROT_NONE);
  memory_ = static_cast<char*>(memory);
#ifdef EMULATOR_TSAN
  if (own_thread) tsan_ = __tsan_create_fiber(0);
#endif
  restart();
}

Fiber::~Fiber() {
#ifdef EMULATOR_TSAN
  if (tsan_) __tsan_destroy_fiber(tsan_);
#endif
#ifdef EMULATOR_ASAN
  __asan_unpoison_memory_region(memory_, kGuard + kStack);
#endif
  munmap(memory_, kGuard + kStack);
}

void Fiber::restart() {
  // The stack looks as if `start` had been called by nobody: a return address, then `start` itself above the registers
  // to pop.
  void** top = reinterpret_cast<void**>(memory_ + kGuard + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&start);
  for (int i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Fiber::start() {
  Fiber* const self = resumed;
  self->arrive(nullptr);
  self->entry_();
  std::abort();  // an entry suspends for good
}

void Fiber::resume() {
  resumed = this;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack_, memory_ + kGuard, kStack);
#endif
#ifdef EMULATOR_TSAN
  scheduler_tsan_ = __tsan_get_current_fiber();
  if (tsan_) __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&scheduler_stack_pointer_, stack_pointer_);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::suspend([[maybe_unused]] bool ending) {
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(ending ? nullptr : &fake_stack_, scheduler_stack_, scheduler_stack_size_);
#endif
#ifdef EMULATOR_TSAN
  if (tsan_) __tsan_switch_to_fiber(scheduler_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  emulator_switch(&stack_pointer_, scheduler_stack_pointer_);
  arrive(fake_stack_);
}

void Fiber::arrive([[maybe_unused]] void* fake_stack) {
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_stack_size_);
#endif
}

}  // namespace emulator
