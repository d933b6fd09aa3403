// Products of small matrices and features by all threads of a parallel region. combine.cpp is the kernel that each of
// them runs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "core/features.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/norms.h"
#include "cpu/runtime/memory.h"
#include "cpu/runtime/threads.h"

namespace icsd::cpu {

using std::int64_t;

// One product of `combine`: a packed matrix for each group.
template <class C>
struct Product {
  const C* matrix;  // (groups, outputs, samples), rows `row_stride` apart, groups `group_stride`
  int64_t row_stride, group_stride, outputs;
  const C* row_scale;    // one for each output, `row_stride` apart, or null
  const C* group_scale;  // one for each group, or null
  Features x, out;
};

// The product of one group.
template <class C>
struct GroupProduct {
  const Product<C>* product;
  int64_t group;

  int64_t packed_bytes(int64_t samples) const {
    const int64_t bytes = product->outputs * samples * (product->x.dtype == DType::float64 ? 8 : 4);
    return kernels().narrow ? std::max(bytes, kernels().narrow->bytes(samples)) : bytes;
  }
};

template <class C>
void combine_some(const GroupProduct<C>* of_groups, int64_t count, Shape shape, int threads) {
  constexpr int64_t kLine = 64;   // splits begin on whole cache lines of features
  constexpr int64_t kSplits = 8;  // splits of a group's features for each thread
  struct Job {
    const Product<C>* product;
    int64_t group;
    Buffer<char> packed;
    std::vector<double> scale;
    std::vector<float> rest;
    bool narrow;

    const C* matrix() const { return product->matrix + group * product->group_stride; }
  };
  std::vector<Job> jobs;
  for (int64_t item = 0; item < count; ++item) {
    const auto [product, group] = of_groups[item];
    jobs.push_back({product, group, Buffer<char>(of_groups[item].packed_bytes(shape.samples)),
                    std::vector<double>(product->outputs), std::vector<float>(product->outputs), false});
  }
  const int64_t splits = threads == 1 ? 1 : std::max<int64_t>(1, kSplits * threads / std::max<int64_t>(count, 1));
  Queue queue(count * splits, threads);
  in_parallel(threads, [&](Member member) {
    const Range range = split_of(count, member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) {
      Job& job = jobs[item];
      const Product<C>& p = *job.product;
      if constexpr (std::is_same_v<C, float>) {
        job.narrow =
            kernels().narrow && p.x.dtype == DType::bfloat16 && p.outputs == shape.samples &&
            kernels().narrow->pack(job.matrix(), p.row_stride, shape.samples, job.packed.data(), job.rest.data());
      }
      for (int64_t i = 0; i < p.outputs; ++i) {
        const double row = p.row_scale ? p.row_scale[job.group * p.group_stride + i * p.row_stride] : C(1);
        job.scale[i] = row * (p.group_scale ? p.group_scale[job.group] : C(1));
      }
    }
    member.barrier();
    for (Job& job : jobs) {
      if (job.narrow) continue;
      const Product<C>& p = *job.product;
      kernels().template pack<C>(p.x.dtype)(job.matrix(), p.row_stride, p.outputs, shape.samples, member.thread,
                                            member.threads, job.packed.data());
    }
    member.barrier();
    queue.each(member, [&](int64_t item) {
      const Job& job = jobs[item / splits];
      const Product<C>& p = *job.product;
      const Range lines =
          split_of(blocks_of(p.x.dim, kLine), static_cast<int>(item % splits), static_cast<int>(splits));
      const int64_t begin = lines.begin * kLine, end = std::min(lines.end * kLine, p.x.dim);
      if (begin >= end) return;
      if (job.narrow) {
        kernels().narrow->combine(job.packed.data(), job.rest.data(), job.scale.data(),
                                  reinterpret_cast<const bfloat16*>(at(p.x, job.group, 0, begin)), p.x.sample_stride,
                                  shape.samples, end - begin,
                                  reinterpret_cast<bfloat16*>(at(p.out, job.group, 0, begin)), p.out.sample_stride);
        return;
      }
      kernels().combine[static_cast<int>(p.x.dtype)](job.packed.data(), job.scale.data(), at(p.x, job.group, 0, begin),
                                                     p.x.sample_stride, shape.samples, end - begin,
                                                     at(p.out, job.group, 0, begin), p.out.sample_stride, p.outputs);
    });
  });
}

// The matrices are packed some at a time: all of them would take as much memory as they do.
template <class C>
void combine_all(const std::vector<Product<C>>& products, Shape shape, int threads) {
  constexpr int64_t kPackedBytes = 8 << 20;
  std::vector<GroupProduct<C>> of_groups;
  int64_t most = 1;
  for (const Product<C>& product : products) {
    for (int64_t group = 0; group < shape.groups; ++group) {
      of_groups.push_back({&product, group});
      most = std::max(most, of_groups.back().packed_bytes(shape.samples));
    }
  }
  const int64_t total = static_cast<int64_t>(of_groups.size()), some = std::max<int64_t>(kPackedBytes / most, threads);
  for (int64_t first = 0; first < total; first += some) {
    combine_some(of_groups.data() + first, std::min(some, total - first), shape, threads);
  }
}

}  // namespace icsd::cpu
