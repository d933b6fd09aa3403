// Threads for a parallel region: OpenMP's pool, which torch shares where both load the same libgomp.
#pragma once

#include <cstdint>

namespace icsd::cpu {

// torch.get_num_threads(), but one for work too small to share and in a forked child, whose pool did not survive.
int threads_for(std::int64_t work);

// Part `index` of `count` equal parts of [0, total).
struct Range {
  std::int64_t begin, end;
};
inline Range part(std::int64_t total, int index, int count) {
  return {total * index / count, total * (index + 1) / count};
}

}  // namespace icsd::cpu
