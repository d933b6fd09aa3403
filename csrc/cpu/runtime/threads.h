// Threads for a parallel region: OpenMP's pool, which torch shares where both load the same libgomp.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace icsd::cpu {

// torch.get_num_threads(), but one for work too small to share and in a forked child, whose pool did not survive.
int threads_for(std::int64_t work);

// One of the threads of a parallel region.
struct Member {
  int thread, threads;

  void barrier() const {
    if (threads > 1) {
#pragma omp barrier
    }
  }
};

// Runs work(Member) on as many threads; on one without a region, whose barriers cost system calls even there.
template <class Work>
void in_parallel(int threads, const Work& work) {
  if (threads == 1) {
    work(Member{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  work(Member{omp_get_thread_num(), omp_get_num_threads()});
}

// Loops of a parallel region, one after the other, with a barrier after each.
class Loops {
 public:
  explicit Loops(int threads) : begins_(threads) {}

  // Runs work(item) for the items [0, total), each taken by whichever thread asks next.
  template <class Work>
  void each(Member member, std::int64_t total, const Work& work) {
    std::int64_t& begin = begins_[member.thread];
    for (std::int64_t item = next_++ - begin; item < total; item = next_++ - begin) work(item);
    begin += total + member.threads;  // every thread has asked once in vain
    member.barrier();
  }

 private:
  std::vector<std::int64_t> begins_;  // of the next loop, for each thread
  std::atomic<std::int64_t> next_{0};
};

// Part `index` of `count` equal parts of [0, total).
struct Range {
  std::int64_t begin, end;
};
inline Range split_of(std::int64_t total, int index, int count) {
  return {total * index / count, total * (index + 1) / count};
}

// The items [0, total): each thread takes its own part of them, the same from one region to the next, for its cache
// holds what it touched in the last; then what the others have left.
class Queue {
 public:
  Queue(std::int64_t total, int threads) : total_(total), next_(threads) {}

  template <class Work>
  void each(Member member, const Work& work) {
    for (int turn = 0; turn < member.threads; ++turn) {
      const int owner = (member.thread + turn) % member.threads;
      const Range own = split_of(total_, owner, member.threads);
      for (std::int64_t item = own.begin + next_[owner].value++; item < own.end;
           item = own.begin + next_[owner].value++) {
        work(item);
      }
    }
  }

 private:
  struct alignas(64) Next {
    std::atomic<std::int64_t> value{0};
  };

  std::int64_t total_;
  std::vector<Next> next_;
};

}  // namespace icsd::cpu
