// Threads of a parallel region. They are OpenMP's, which torch shares if both load the same libgomp.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace icsd::cpu {

// Returns torch.get_num_threads(), or fewer if there is little work. In a forked child it returns 1: the threads of the
// parent do not exist there.
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

// Runs work(Member) on `threads` threads. A single one needs no parallel region, whose barriers cost system calls.
template <class Work>
void in_parallel(int threads, const Work& work) {
  if (threads == 1) {
    work(Member{0, 1});
    return;
  }
#pragma omp parallel num_threads(threads)
  work(Member{omp_get_thread_num(), omp_get_num_threads()});
}

// A sequence of loops in a parallel region, with a barrier after each.
class Loops {
 public:
  explicit Loops(int threads) : begins_(threads) {}

  // Runs work(item) for the items [0, total), each taken by whichever thread asks next.
  template <class Work>
  void each(Member member, std::int64_t total, const Work& work) {
    std::int64_t& begin = begins_[member.thread];
    for (std::int64_t item = next_++ - begin; item < total; item = next_++ - begin) work(item);
    begin += total + member.threads;  // every thread has asked once more than it got items
    member.barrier();
  }

 private:
  std::vector<std::int64_t> begins_;  // of the next loop, for each thread
  std::atomic<std::int64_t> next_{0};
};

// Returns split `index` of `count` equal splits of [0, total).
struct Range {
  std::int64_t begin, end;
};
inline Range split_of(std::int64_t total, int index, int count) {
  return {total * index / count, total * (index + 1) / count};
}

// The items [0, total), shared among threads. Each thread first takes those of its own split, which is the same in
// every region, because its cache may still hold their data. Then it takes what the others have left.
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
