// The sanitizers' interfaces where this build has them: EMULATOR_ASAN or EMULATOR_TSAN, else nothing.
#pragma once

#ifdef EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

namespace emulator {

// Writes before a release are seen after a later acquire of the same tag.
inline void release([[maybe_unused]] const void* tag) {
#ifdef EMULATOR_TSAN
  __tsan_release(const_cast<void*>(tag));
#endif
}
inline void acquire([[maybe_unused]] const void* tag) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(const_cast<void*>(tag));
#endif
}

// Accesses in its scope are the emulator's own: they are no race.
struct Unchecked {
#ifdef EMULATOR_TSAN
  Unchecked() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unchecked() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unchecked() {}
#endif
};

}  // namespace emulator
