// Gives the processor tile registers that it may not have: `-include` this, and the unmodified sources run on them.
//
// It follows Intel's Architecture Instruction Set Extensions Programming Reference on AMX, and is stricter: tiles are
// used between `_tile_loadconfig` and `_tile_release` only, their rows and bytes must be those that an instruction
// needs, and a register holds NaN until something is put into it.
#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

struct Layout {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(Layout) == 64);

struct Registers {
  Layout layout;
  unsigned char data[8][16][64];
};

inline Registers& registers() {
  thread_local Registers of_thread{};
  return of_thread;
}

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "AMX: %s\n", what);
  std::abort();
}

inline Registers& with_tile(int tile) {
  Registers& all = registers();
  require(all.layout.palette == 1, "tiles are not configured");
  require(tile >= 0 && tile < 8 && all.layout.rows[tile] > 0, "no such tile");
  return all;
}

inline void load_layout(const void* address) {
  Registers& all = registers();
  std::memcpy(&all.layout, address, sizeof all.layout);
  require(all.layout.palette == 1 && all.layout.start_row == 0, "another palette than 1, or a row to start from");
  for (int tile = 0; tile < 16; ++tile) {
    const bool used = all.layout.rows[tile] || all.layout.row_bytes[tile];
    require(!used || (tile < 8 && all.layout.rows[tile] <= 16 && all.layout.row_bytes[tile] <= 64),
            "tiles are too large");
  }
  std::memset(all.data, 0xff, sizeof all.data);
}

inline void release() {
  require(registers().layout.palette == 1, "tiles are released that were not configured");
  registers().layout.palette = 0;
}

inline void zero(int tile) { std::memset(with_tile(tile).data[tile], 0, sizeof registers().data[tile]); }

inline void load(int tile, const void* base, long stride) {
  Registers& all = with_tile(tile);
  zero(tile);
  for (int row = 0; row < all.layout.rows[tile]; ++row) {
    std::memcpy(all.data[tile][row], static_cast<const char*>(base) + row * stride, all.layout.row_bytes[tile]);
  }
}

inline void store(int tile, void* base, long stride) {
  const Registers& all = with_tile(tile);
  for (int row = 0; row < all.layout.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(base) + row * stride, all.data[tile][row], all.layout.row_bytes[tile]);
  }
}

// bfloat16 to float32, subnormal numbers as zero.
__attribute__((no_sanitize("address", "undefined"))) inline float widen(const unsigned char* from) {
  std::uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  if (!(bits & 0x7f80)) bits &= 0x8000;
  const std::uint32_t wide = std::uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// sums_mn += Σ_k a_m,2k b_k,2n + a_m,2k+1 b_k,2n+1
//
// It reads registers alone, so sanitizers have nothing to find in it; with them it would take most of a test's time.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) inline void add_products(
    float (&sums)[16][16], const unsigned char (&a)[16][64], const unsigned char (&b)[16][64], int rows, int terms) {
  float left[16][32], right[16][2][16];
  for (int row = 0; row < 16; ++row) {
    for (int i = 0; i < 32; ++i) {
      left[row][i] = widen(a[row] + 2 * i);
      right[row][i % 2][i / 2] = widen(b[row] + 2 * i);
    }
  }
  for (int m = 0; m < rows; ++m) {
    float parts[2][16] = {};
    for (int k = 0; k < terms; ++k) {
      for (int part = 0; part < 2; ++part) {
        for (int n = 0; n < 16; ++n) parts[part][n] += left[m][2 * k + part] * right[k][part][n];
      }
    }
    for (int n = 0; n < 16; ++n) sums[m][n] += parts[0][n] + parts[1][n];
  }
}

inline void multiply(int sums, int a, int b) {
  with_tile(a), with_tile(b);
  Registers& all = with_tile(sums);
  require(sums != a && sums != b && a != b, "a product takes three tiles");
  require(all.layout.rows[sums] == all.layout.rows[a] && all.layout.row_bytes[sums] == all.layout.row_bytes[b] &&
              all.layout.row_bytes[a] == 4 * all.layout.rows[b],
          "the tiles of a product do not fit each other");
  float totals[16][16];
  std::memcpy(totals, all.data[sums], sizeof totals);
  add_products(totals, all.data[a], all.data[b], all.layout.rows[sums], all.layout.rows[b]);
  for (int row = 0; row < all.layout.rows[sums]; ++row) {
    std::memcpy(all.data[sums][row], totals[row], all.layout.row_bytes[sums]);
  }
}

}  // namespace emulated_amx

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::load_layout
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply

// These answer the questions of csrc/cpu/runtime/dispatch.cpp to the processor and the system.
#define __builtin_cpu_supports(feature) (!__builtin_strncmp(feature, "amx-", 4) || __builtin_cpu_supports(feature))
#define syscall(number, ...) (number == SYS_arch_prctl ? 0L : -1L)
