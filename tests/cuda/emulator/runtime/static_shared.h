#pragma once

#include <cstddef>

namespace emulator {

// Returns the bytes of static shared memory of a kernel.
std::size_t static_shared(const void* kernel);

}  // namespace emulator
