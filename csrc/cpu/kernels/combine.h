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

// Returns the bytes of a packed matrix.
template <class C>
int64_t packed_bytes(const Product<C>& product, int64_t samples) {
  const int64_t bytes = product.outputs * samples * (product.x.dtype == DType::float64 ? 8 : 4);
  return kernels().narrow ? std::max(bytes, kernels().narrow->bytes(samples)) : bytes;
}

// The product of one group.
template <class C>
class GroupProduct {
 public:
  // `packed` is memory of `packed_bytes`.
  GroupProduct(const Product<C>& product, int64_t group, int64_t samples, char* packed)
      : product_(&product),
        group_(group),
        samples_(samples),
        packed_(packed),
        scale_(product.outputs),
        rest_(product.outputs) {}

  // Makes the factors of the rows, and packs the matrix if it is one for NarrowKernels.
  void begin() {
    const Product<C>& p = *product_;
    if constexpr (std::is_same_v<C, float>) {
      narrow_ = kernels().narrow && p.x.dtype == DType::bfloat16 && p.outputs == samples_ &&
                kernels().narrow->pack(matrix(), p.row_stride, samples_, packed_, rest_.data());
    }
    for (int64_t i = 0; i < p.outputs; ++i) {
      const double row = p.row_scale ? p.row_scale[group_ * p.group_stride + i * p.row_stride] : C(1);
      scale_[i] = row * (p.group_scale ? p.group_scale[group_] : C(1));
    }
  }

  // Packs one of `parts` equal parts of the matrix, unless `begin` has packed it.
  void pack(int part, int parts) {
    if (narrow_) return;
    kernels().template pack<C>(product_->x.dtype)(matrix(), product_->row_stride, product_->outputs, samples_, part,
                                                  parts, packed_);
  }

  // Computes the features [begin, end).
  void multiply(int64_t begin, int64_t end, const Ahead& ahead) const {
    const Product<C>& p = *product_;
    const void* const x = at(p.x, group_, 0, begin);
    void* const out = at(p.out, group_, 0, begin);
    if (narrow_) {
      kernels().narrow->combine(packed_, rest_.data(), scale_.data(), static_cast<const bfloat16*>(x),
                                p.x.sample_stride, samples_, end - begin, static_cast<bfloat16*>(out),
                                p.out.sample_stride, ahead);
      return;
    }
    kernels().combine[static_cast<int>(p.x.dtype)](packed_, scale_.data(), x, p.x.sample_stride, samples_, end - begin,
                                                   out, p.out.sample_stride, p.outputs, ahead);
  }

  // Sets what this product reads first, to be fetched.
  void announce(Ahead& ahead) const {
    const Product<C>& p = *product_;
    const int64_t size = size_of(p.x.dtype);
    ahead.set(0, at(p.x, group_, 0, 0), p.x.sample_stride * size, samples_, p.x.dim * size);
    ahead.set(1, matrix(), p.row_stride * sizeof(C), p.outputs, samples_ * sizeof(C));
  }

 private:
  const C* matrix() const { return product_->matrix + group_ * product_->group_stride; }

  const Product<C>* product_;
  int64_t group_, samples_;
  char* packed_;
  std::vector<double> scale_;
  std::vector<float> rest_;
  bool narrow_ = false;
};

// Computes a few products, each by all threads.
template <class C>
void combine_together(const std::vector<Product<C>>& products, Shape shape, int threads) {
  constexpr int64_t kLine = 64;   // splits begin on whole cache lines of features
  constexpr int64_t kSplits = 8;  // splits of all features for each thread
  std::vector<Buffer<char>> packed;
  std::vector<GroupProduct<C>> jobs;
  for (const Product<C>& product : products) {
    for (int64_t group = 0; group < shape.groups; ++group) {
      packed.emplace_back(packed_bytes(product, shape.samples));
      jobs.emplace_back(product, group, shape.samples, packed.back().data());
    }
  }
  const int64_t count = static_cast<int64_t>(jobs.size());
  const int64_t splits = std::max<int64_t>(1, kSplits * threads / std::max<int64_t>(count, 1));
  Queue queue(count * splits, threads);
  in_parallel(threads, [&](Member member) {
    const Range range = split_of(count, member.thread, member.threads);
    for (int64_t item = range.begin; item < range.end; ++item) jobs[item].begin();
    member.barrier();
    for (GroupProduct<C>& job : jobs) job.pack(member.thread, member.threads);
    member.barrier();
    queue.each(member, [&](int64_t item) {
      const int64_t dim = products[item / splits / shape.groups].x.dim;
      const Range lines = split_of(blocks_of(dim, kLine), static_cast<int>(item % splits), static_cast<int>(splits));
      const int64_t begin = lines.begin * kLine, end = std::min(lines.end * kLine, dim);
      if (begin < end) jobs[item / splits].multiply(begin, end, {});
    });
  });
}

// Computes many products, each by one thread. While it multiplies, it fetches what the next product reads.
template <class C>
void combine_each(const std::vector<Product<C>>& products, Shape shape, int threads) {
  int64_t most = 0;
  for (const Product<C>& product : products) most = std::max(most, packed_bytes(product, shape.samples));
  const int64_t total = static_cast<int64_t>(products.size()) * shape.groups;
  Queue queue(total, threads);
  in_parallel(threads, [&](Member member) {
    Buffer<char> packed(most);
    const auto job_of = [&](int64_t item) {
      return GroupProduct<C>(products[item / shape.groups], item % shape.groups, shape.samples, packed.data());
    };
    queue.each(member, [&](int64_t item) {
      GroupProduct<C> job = job_of(item);
      job.begin();
      job.pack(0, 1);
      Ahead ahead{};
      if (item + 1 < total) job_of(item + 1).announce(ahead);
      job.multiply(0, products[item / shape.groups].x.dim, ahead);
    });
  });
}

template <class C>
void combine_all(const std::vector<Product<C>>& products, Shape shape, int threads) {
  constexpr int64_t kProducts = 4;  // for each thread, so that all of them have about as much work
  const int64_t total = static_cast<int64_t>(products.size()) * shape.groups;
  if (threads == 1 || total >= kProducts * threads) {
    combine_each(products, shape, threads);
  } else {
    combine_together(products, shape, threads);
  }
}

}  // namespace icsd::cpu
