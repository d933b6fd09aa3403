// A stack for a CUDA thread and the switch to and from it, announced to the sanitizers.
#pragma once

#include <cstddef>

namespace emulator {

class Fiber {
 public:
  // ThreadSanitizer sees it as a thread of its own, or as a part of the OS thread that runs it; then its stack is
  // unguarded.
  Fiber(void (*entry)(), bool own_thread);
  ~Fiber();
  Fiber(const Fiber&) = delete;

  void restart();                     // stands before its entry again
  void resume();                      // from the scheduler, until the fiber suspends itself
  void suspend(bool ending = false);  // an ending fiber is not resumed before it is restarted

 private:
  static void start();
  void arrive(void* fake_stack);

  void (*const entry_)();
  char* memory_;  // a page that may guard, then the stack
  void *stack_pointer_, *scheduler_stack_pointer_;
  void *fake_stack_ = nullptr, *scheduler_fake_stack_ = nullptr;  // AddressSanitizer's
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_stack_size_ = 0;
  void *tsan_ = nullptr, *scheduler_tsan_ = nullptr;  // ThreadSanitizer's
};

}  // namespace emulator
