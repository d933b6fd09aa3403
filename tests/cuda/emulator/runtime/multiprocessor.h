// Runs the blocks of a launch, one at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "emulator.h"
#include "fiber.h"

namespace emulator {

struct Launch {
  const void* kernel;
  const std::function<void()>& body;
  dim3 grid, block;
  std::size_t shared;
  std::uint64_t seed;  // of the schedule; 0 runs warps and lanes in order
  bool concurrent;     // blocks on OS threads of their own, to find races between them but not within
  bool early;          // launched before the previous kernel has finished

  std::mutex mutex{};
  std::atomic<bool> failed{false};
  std::string failure{};
};

struct Thread {
  enum State { running, at_barrier, in_warp, returned };

  Thread(void (*entry)(), bool own_thread) : fiber(entry, own_thread) {}

  Fiber fiber;
  State state{};
  unsigned number{};
  uint3 index{};
  // The place where it waits, and the reason.
  const char* name{};
  Site site{};
  unsigned mask{};
  void* data{};
  char woken_tag{};

  Pipeline pipeline{};
  bool ended{}, fenced{}, waited{};
  std::vector<const void*> atomics{};  // what the next fence orders later accesses after
};

class Multiprocessor {
 public:
  // Returns the one that runs on this OS thread.
  static Multiprocessor& here();

  void run(Launch& launch, uint3 block);

  Thread& thread() { return *thread_; }
  const Launch& launch() const { return *launch_; }
  const uint3& block() const { return block_; }
  void* dynamic_shared() const { return dynamic_shared_; }
  bool is_shared(const void* pointer) const;

  unsigned barrier(const char* name, bool predicate, Site site);
  void collective(const char* name, unsigned mask, void* data, Complete complete, Site site, bool orders_memory);
  [[noreturn]] void fail(Site site, const std::string& message);

 private:
  static void enter();
  void prepare();
  void schedule();
  Thread* choose();
  void wait(Thread::State state, const char* name, Site site);
  void suspend();
  [[noreturn]] void end();
  unsigned waiting_lanes(const char* name, unsigned mask, Site site);
  void wake(Thread& thread);
  [[noreturn]] void finish();
  std::string deadlock() const;

  Launch* launch_ = nullptr;
  uint3 block_{};
  unsigned count_ = 0;                            // threads of the block
  std::vector<std::unique_ptr<Thread>> threads_;  // as many as any block needed
  Thread* thread_ = nullptr;                      // the running one
  char start_tag_{}, end_tag_{};

  std::vector<unsigned> runnable_;  // lanes, for each warp
  unsigned favorite_ = 0;           // the warp that runs ahead
  unsigned returned_ = 0;
  std::minstd_rand random_;

  // The lanes that have come to a collective operation, for each warp the one that was last come to.
  struct Gathering {
    const char* name;
    Site site;
    unsigned mask, arrived;
  };
  std::vector<Gathering> gatherings_;

  struct {
    const char* name;
    Site site;
    unsigned arrived, predicates, result, generation;
    char tags[2];
  } barrier_{};

  void* dynamic_shared_ = nullptr;
  void* static_shared_ = nullptr;
  std::size_t static_bytes_ = 0;
};

}  // namespace emulator
