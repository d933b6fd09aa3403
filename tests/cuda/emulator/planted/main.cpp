// main BUG|all planted|corrected SEED sequential|concurrent: 0 for the right result, 1 for a wrong one, 2 for an error.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "accumulation_without_atomics.cu"
#include "copy_into_a_tile_in_use.cu"
#include "divergent_barrier.cu"
#include "dynamic_shared_overrun.cu"
#include "exited_lanes_in_mask.cu"
#include "global_overrun.cu"
#include "misaligned_copy.cu"
#include "misaligned_tile.cu"
#include "misaligned_vector.cu"
#include "missing_lane.cu"
#include "reduction_without_barrier.cu"
#include "static_shared_overrun.cu"
#include "ticket_without_fence.cu"
#include "tile_loop_without_trailing_barrier.cu"
#include "tile_past_a_row.cu"
#include "uninitialized_shared.cu"
#include "wrong_wait_prior.cu"

extern "C" void emulator_seed(std::uint64_t seed);
extern "C" void emulator_concurrent_blocks(int yes);

int main(int count, char** arguments) {
  if (count != 5) return 3;
  const std::string name = arguments[1];
  const bool planted = arguments[2] == std::string("planted");
  emulator_seed(std::strtoull(arguments[3], nullptr, 10));
  emulator_concurrent_blocks(arguments[4] == std::string("concurrent"));
  for (const Bug* bug = bugs; bug; bug = bug->next) {
    if (name != bug->name && name != "all") continue;
    try {
      if ((planted ? bug->planted : bug->corrected)()) continue;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s: %s\n", bug->name, error.what());
      return 2;
    }
    std::fprintf(stderr, "%s: wrong result\n", bug->name);
    return 1;
  }
  return 0;
}
