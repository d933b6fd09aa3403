#include "multiprocessor.h"

#include <link.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "sanitizers.h"

extern "C" void* __tls_get_addr(std::size_t* module_and_offset);

namespace emulator {
namespace {

thread_local Multiprocessor* running_here = nullptr;

std::string format(const char* text, std::va_list arguments) {
  char line[512];
  std::vsnprintf(line, sizeof line, text, arguments);
  return line;
}

[[gnu::format(printf, 1, 2)]] std::string format(const char* text, ...) {
  std::va_list arguments;
  va_start(arguments, text);
  std::string line = format(text, arguments);
  va_end(arguments);
  return line;
}

std::string where(const char* name, Site site) { return format("%s at %s:%d", name, site.file, site.line); }

bool same(const char* name, Site site, const char* other_name, Site other) {
  if (name == other_name && site.file == other.file) return site.line == other.line;
  return other_name && !std::strcmp(name, other_name) && site.line == other.line && !std::strcmp(site.file, other.file);
}

template <class F>
void for_each_lane(unsigned mask, F f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

// Memory that was never written is NaN.
void poison(void* memory, std::size_t bytes) {
  const Unchecked scope;
  std::memset(memory, 0xff, bytes);
}

// The module whose code `address` is. Its static shared memory is its thread-local storage, or with AddressSanitizer
// all it can write to.
struct Module {
  const void* address;
  std::size_t tls_module = 0;
  void* shared = nullptr;
  std::size_t bytes = 0;
};

int find_module(dl_phdr_info* info, std::size_t, void* data) {
  auto& module = *static_cast<Module*>(data);
  Module found{module.address, info->dlpi_tls_modid};
  const auto address = reinterpret_cast<std::uintptr_t>(module.address);
  bool here = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const auto begin = info->dlpi_addr + segment.p_vaddr;
    here |= segment.p_type == PT_LOAD && address >= begin && address < begin + segment.p_memsz;
#ifdef EMULATOR_ASAN
    if (segment.p_type == PT_LOAD && segment.p_flags & PF_W) {
      found.shared = reinterpret_cast<void*>(begin);
      found.bytes = segment.p_memsz;
    }
#else
    if (segment.p_type == PT_TLS) found.bytes = segment.p_memsz;
#endif
  }
  if (here) module = found;
  return here;
}

}  // namespace

Multiprocessor& Multiprocessor::here() { return *running_here; }

void Multiprocessor::run(Launch& launch, uint3 block) {
  running_here = this;
  launch_ = &launch;
  block_ = block;
  random_.seed(launch.seed * 1000003 + block.x + 31 * block.y + 961 * block.z);
  prepare();

  Module module{launch.kernel};
  dl_iterate_phdr(find_module, &module);
#ifndef EMULATOR_ASAN
  if (module.bytes) {
    std::size_t start[2] = {module.tls_module, 0};
    module.shared = __tls_get_addr(start);
    poison(module.shared, module.bytes);
  }
#endif
  static_shared_ = module.shared;
  static_bytes_ = module.bytes;
  // It has not a byte more than was asked for, so that the next one is an error.
  if (posix_memalign(&dynamic_shared_, 128, launch.shared)) throw std::bad_alloc();
  poison(dynamic_shared_, launch.shared);

  release(&start_tag_);
  schedule();
  for (unsigned i = 0; i < count_ && launch.failed; ++i) {
    thread_ = threads_[i].get();
    if (!thread_->ended) thread_->fiber.resume();
  }
  acquire(&end_tag_);
  std::free(dynamic_shared_);
  if (launch.failed) threads_.clear();  // some stand in the midst of the kernel
}

void Multiprocessor::prepare() {
  const dim3 size = launch_->block;
  count_ = size.x * size.y * size.z;
  runnable_.assign((count_ + 31) / 32, 0);
  gatherings_.assign(runnable_.size(), {});
  returned_ = barrier_.arrived = barrier_.predicates = 0;
  while (threads_.size() < count_) threads_.push_back(std::make_unique<Thread>(enter, !launch_->concurrent));
  for (unsigned i = 0; i < count_; ++i) {
    Thread& thread = *threads_[i];
    thread.fiber.restart();
    thread.number = i;
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.pipeline = {};
    thread.fenced = thread.ended = thread.waited = false;
    thread.atomics.clear();
    wake(thread);
  }
}

void Multiprocessor::schedule() {
  while (!launch_->failed && returned_ < count_) {
    thread_ = choose();
    if (!thread_) {
      const std::lock_guard lock(launch_->mutex);
      launch_->failure = deadlock();
      launch_->failed = true;
      return;
    }
    thread_->fiber.resume();
  }
}

// One warp runs ahead for a while, its lanes in any order.
Thread* Multiprocessor::choose() {
  unsigned warps = 0;
  for (unsigned i = 0; i < runnable_.size(); ++i) warps |= (runnable_[i] != 0) << i;
  if (!warps) return nullptr;
  const auto pick = [this](unsigned mask) {
    if (launch_->seed) {
      for (unsigned skip = random_() % __builtin_popcount(mask); skip; --skip) mask &= mask - 1;
    }
    return __builtin_ctz(mask);
  };
  if (!(warps >> favorite_ & 1) || !launch_->seed || random_() % 32 == 0) favorite_ = pick(warps);
  return threads_[favorite_ * 32 + pick(runnable_[favorite_])].get();
}

void Multiprocessor::enter() {
  Multiprocessor& self = here();
  acquire(&self.start_tag_);
  if (!self.launch_->failed) self.launch_->body();
  self.finish();
}

void Multiprocessor::finish() {
  if (launch_->failed) end();
  Thread& thread = *thread_;
  if (launch_->early && !thread.waited)
    fail({__FILE__, __LINE__}, format("thread %u returned without waiting for the previous kernel", thread.number));
  if (barrier_.arrived)
    fail(barrier_.site, format("%s: thread %u of the block returned without it", barrier_.name, thread.number));
  const unsigned warp = thread.number / 32;
  for (unsigned i = warp * 32; i < std::min(warp * 32 + 32, count_); ++i) {
    const Thread& other = *threads_[i];
    if (other.state == Thread::in_warp && other.mask >> thread.number % 32 & 1) {
      fail(other.site,
           format("%s: mask %#x names lane %u, which returned", other.name, other.mask, thread.number % 32));
    }
  }
  thread.state = Thread::returned;
  runnable_[warp] &= ~(1u << thread.number % 32);
  ++returned_;
  end();
}

void Multiprocessor::wait(Thread::State state, const char* name, Site site) {
  Thread& thread = *thread_;
  thread.state = state;
  thread.name = name;
  thread.site = site;
  runnable_[thread.number / 32] &= ~(1u << thread.number % 32);
  suspend();
}

void Multiprocessor::suspend() {
  thread_->fiber.suspend();
  if (launch_->failed) end();
}

// From now on, the host may see the thread's writes.
void Multiprocessor::end() {
  thread_->ended = true;
  release(&end_tag_);
  thread_->fiber.suspend(true);
  std::abort();  // an ended thread is started again, not resumed
}

void Multiprocessor::wake(Thread& thread) {
  thread.state = Thread::running;
  runnable_[thread.number / 32] |= 1u << thread.number % 32;
}

unsigned Multiprocessor::barrier(const char* name, bool predicate, Site site) {
  if (returned_) fail(site, format("%s: %u threads of the block have returned", name, returned_));
  if (barrier_.arrived == 0) {
    barrier_.name = name;
    barrier_.site = site;
  } else if (!same(name, site, barrier_.name, barrier_.site)) {
    fail(site,
         format("%s: divergent barrier, other threads wait in %s", name, where(barrier_.name, barrier_.site).c_str()));
  }
  // Two tags in turns: a thread may come to the next barrier before another has left this one.
  char* const tag = &barrier_.tags[barrier_.generation % 2];
  release(tag);
  barrier_.predicates += predicate;
  if (++barrier_.arrived < count_) {
    wait(Thread::at_barrier, name, site);
  } else {
    barrier_.result = barrier_.predicates;
    barrier_.arrived = barrier_.predicates = 0;
    ++barrier_.generation;
    for (unsigned i = 0; i < count_; ++i) wake(*threads_[i]);
    suspend();
  }
  acquire(tag);
  return barrier_.result;
}

void Multiprocessor::collective(const char* name, unsigned mask, void* data, Complete complete, Site site,
                                bool orders_memory) {
  Thread& self = *thread_;
  const unsigned lane = self.number % 32, first = self.number - lane;
  self.mask = mask;
  self.data = data;
  Gathering& gathering = gatherings_[self.number / 32];
  if (!(mask >> lane & 1)) fail(site, format("%s: lane %u is not in its own mask %#x", name, lane, mask));
  // Lanes that come to what the last one waits for are many, and need no look at all the others.
  if (gathering.mask != mask || !same(name, site, gathering.name, gathering.site)) {
    gathering = {name, site, mask, waiting_lanes(name, mask, site)};
  }
  gathering.arrived |= 1u << lane;
  if (orders_memory) release(&self);
  if (gathering.arrived != mask) {
    wait(Thread::in_warp, name, site);
  } else {
    gathering = {};
    void* lanes[32];
    for_each_lane(mask, [&](unsigned other) { lanes[other] = threads_[first + other]->data; });
    {
      const Unchecked scope;
      complete(lanes, mask);
    }
    if (orders_memory) for_each_lane(mask, [&](unsigned other) { acquire(threads_[first + other].get()); });
    for_each_lane(mask, [&](unsigned other) {
      if (orders_memory) release(&threads_[first + other]->woken_tag);
      wake(*threads_[first + other]);
    });
    suspend();
  }
  if (orders_memory) acquire(&self.woken_tag);
}

// The lanes of `mask` that are there already; fails if one of them cannot come.
unsigned Multiprocessor::waiting_lanes(const char* name, unsigned mask, Site site) {
  const unsigned lane = thread_->number % 32, first = thread_->number - lane;
  unsigned waiting = 0;
  for_each_lane(mask & ~(1u << lane), [&](unsigned other) {
    if (first + other >= count_)
      fail(site, format("%s: mask %#x names lane %u, which the block has not", name, mask, other));
    const Thread& thread = *threads_[first + other];
    if (thread.state == Thread::returned)
      fail(site, format("%s: mask %#x names lane %u, which has returned", name, mask, other));
    if (thread.state != Thread::in_warp || !(thread.mask >> lane & 1)) return;
    if (thread.mask != mask || !same(name, site, thread.name, thread.site)) {
      fail(site, format("%s: mask %#x, but lane %u waits with mask %#x in %s", name, mask, other, thread.mask,
                        where(thread.name, thread.site).c_str()));
    }
    waiting |= 1u << other;
  });
  return waiting;
}

bool Multiprocessor::is_shared(const void* pointer) const {
  const auto within = [pointer](const void* begin, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(pointer) - reinterpret_cast<std::uintptr_t>(begin) < bytes;
  };
  return within(dynamic_shared_, launch_->shared) || within(static_shared_, static_bytes_);
}

void Multiprocessor::fail(Site site, const std::string& message) {
  const uint3 &index = thread_->index, &block = block_;
  {
    const std::lock_guard lock(launch_->mutex);
    if (!launch_->failed) {
      launch_->failure = format("%s:%d: %s (block %u,%u,%u thread %u,%u,%u)", site.file, site.line, message.c_str(),
                                block.x, block.y, block.z, index.x, index.y, index.z);
    }
    launch_->failed = true;
  }
  end();
}

std::string Multiprocessor::deadlock() const {
  unsigned waiting = 0;
  for (unsigned i = 0; i < count_; ++i) waiting += threads_[i]->state == Thread::at_barrier;
  std::string text = format("deadlock in block %u,%u,%u", block_.x, block_.y, block_.z);
  if (waiting) text += format("; %u threads wait in %s", waiting, where(barrier_.name, barrier_.site).c_str());
  for (unsigned i = 0; i < count_; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.state != Thread::in_warp) continue;
    text += format("; thread %u waits with mask %#x in %s", i, thread.mask, where(thread.name, thread.site).c_str());
    break;
  }
  return text;
}

// The functions that the headers call.

const uint3& thread_index() { return Multiprocessor::here().thread().index; }
const uint3& block_index() { return Multiprocessor::here().block(); }
const dim3& block_size() { return Multiprocessor::here().launch().block; }
const dim3& grid_size() { return Multiprocessor::here().launch().grid; }
unsigned lane() { return Multiprocessor::here().thread().number % 32; }
void* dynamic_shared() { return Multiprocessor::here().dynamic_shared(); }
bool is_shared(const void* pointer) { return Multiprocessor::here().is_shared(pointer); }
Pipeline& pipeline() { return Multiprocessor::here().thread().pipeline; }

void fail(Site site, const char* text, ...) {
  std::va_list arguments;
  va_start(arguments, text);
  const std::string message = format(text, arguments);
  va_end(arguments);
  Multiprocessor::here().fail(site, message);
}

unsigned block_barrier(const char* name, bool predicate, Site site) {
  return Multiprocessor::here().barrier(name, predicate, site);
}

void warp_collective(const char* name, unsigned mask, void* data, Complete complete, Site site, bool orders_memory) {
  Multiprocessor::here().collective(name, mask, data, complete, site, orders_memory);
}

void before_atomic(const void* address) {
  Thread& thread = Multiprocessor::here().thread();
  if (thread.fenced) release(address);
  thread.fenced = false;
}

void after_atomic(const void* address) { Multiprocessor::here().thread().atomics.push_back(address); }

void wait_for_previous() { Multiprocessor::here().thread().waited = true; }

void fence() {
  Thread& thread = Multiprocessor::here().thread();
  for (const void* address : thread.atomics) acquire(address);
  thread.atomics.clear();
  thread.fenced = true;
}

}  // namespace emulator
