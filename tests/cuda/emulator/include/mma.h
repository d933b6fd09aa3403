// nvcuda::wmma. The elements of a tile are dealt to the lanes in an order that no kernel can have guessed.
#pragma once

#include <type_traits>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "emulator.h"

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
namespace precision {
struct tf32;
}
enum layout_t { mem_row_major, mem_col_major };

namespace detail {

template <class T>
struct Element {
  using type = T;
};
template <>
struct Element<precision::tf32> {
  using type = float;
};

template <class T>
constexpr bool supported(int m, int n, int k) {
  if (std::is_same_v<T, precision::tf32>) return m == 16 && n == 16 && k == 8;
  if (std::is_same_v<T, double>) return m == 8 && n == 8 && k == 4;
  if (std::is_same_v<T, float>) return k == 16 || (m == 16 && k == 8);
  const bool shape = m == 16 ? n == 16 : (m == 32 && n == 8) || (m == 8 && n == 32);
  return (std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>) && shape && k == 16;
}

// How many products are summed before the sum is truncated; 0: double is not.
template <class T>
constexpr int kExactProducts = std::is_same_v<T, double>            ? 0
                               : std::is_same_v<T, precision::tf32> ? 4
                                                                    : 8;

// Returns the value that tensor cores see: tf32 is a float without its low 13 bits.
template <class T, class E>
double operand(E element) {
  if constexpr (std::is_same_v<T, precision::tf32>) {
    std::uint32_t word;
    std::memcpy(&word, &element, sizeof word);
    word &= 0xffffe000;
    std::memcpy(&element, &word, sizeof word);
  }
  return element;
}

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout = void>
class fragment {
 public:
  static_assert(detail::supported<T>(m, n, k), "the tensor cores have no such tile");
  static_assert(__CUDA_ARCH__ >= 800 || std::is_same_v<T, __half> || std::is_same_v<T, float>, "needs sm_80");
  static constexpr int rows = std::is_same_v<Use, matrix_b> ? k : m;
  static constexpr int columns = std::is_same_v<Use, matrix_a> ? k : n;
  static constexpr int num_elements = rows * columns / 32;

  // Returns the place in the row-major tile of element `i` of `lane`: sizes are powers of two, the factor is odd.
  static int position(unsigned lane, int i) {
    return (lane * num_elements + i) * (std::is_same_v<Use, accumulator> ? 77 : 45) % (rows * columns);
  }
  static int position(unsigned lane, int i, unsigned stride, bool row_major) {
    const int where = position(lane, i), row = where / columns, column = where % columns;
    return row_major ? row * stride + column : column * stride + row;
  }

  typename detail::Element<T>::type x[num_elements];
};

namespace detail {

// All 32 lanes come with the same pointer and stride, aligned as the instruction wants them.
inline void agree(const char* name, const void* pointer, unsigned stride, std::size_t element_bytes,
                  emulator::Site site) {
  emulator::require_aligned(pointer, 32, name, site);
  if (stride * element_bytes % 16)
    emulator::fail(site, "%s: a leading dimension of %u is not a multiple of 16 bytes", name, stride);
  struct Lane {
    const void* pointer;
    unsigned stride;
    bool differs;
  } lane{pointer, stride, false};
  emulator::warp_collective(
      name, 0xffffffff, &lane,
      [](void* const* lanes, unsigned) {
        for (int i = 0; i < 32; ++i) {
          Lane &first = *static_cast<Lane*>(lanes[0]), &other = *static_cast<Lane*>(lanes[i]);
          other.differs = first.pointer != other.pointer || first.stride != other.stride;
        }
      },
      site);
  if (lane.differs) emulator::fail(site, "%s: the lanes give different pointers or leading dimensions", name);
}

template <class Fragment, class E>
void load(Fragment& a, const E* p, unsigned stride, bool row_major, emulator::Site site) {
  agree("load_matrix_sync", p, stride, sizeof(E), site);
  for (int i = 0; i < a.num_elements; ++i) a.x[i] = p[a.position(emulator::lane(), i, stride, row_major)];
}

}  // namespace detail

template <class Use, int m, int n, int k, class T, class Layout, class E>
void load_matrix_sync(fragment<Use, m, n, k, T, Layout>& a, const E* p, unsigned stride, EMULATOR_SITE) {
  static_assert(std::is_same_v<E, typename detail::Element<T>::type>, "the tile in memory has other elements");
  detail::load(a, p, stride, std::is_same_v<Layout, row_major>, site);
}

template <int m, int n, int k, class T>
void load_matrix_sync(fragment<accumulator, m, n, k, T>& a, const T* p, unsigned stride, layout_t layout,
                      EMULATOR_SITE) {
  detail::load(a, p, stride, layout == mem_row_major, site);
}

template <int m, int n, int k, class T>
void store_matrix_sync(T* p, const fragment<accumulator, m, n, k, T>& a, unsigned stride, layout_t layout,
                       EMULATOR_SITE) {
  detail::agree("store_matrix_sync", p, stride, sizeof(T), site);
  for (int i = 0; i < a.num_elements; ++i) {
    p[a.position(emulator::lane(), i, stride, layout == mem_row_major)] = a.x[i];
  }
}

template <class Use, int m, int n, int k, class T, class Layout, class E>
void fill_fragment(fragment<Use, m, n, k, T, Layout>& a, const E& value) {
  for (auto& x : a.x) x = value;
}

namespace detail {

template <class A, class B, class C>
struct Operands {
  C* d;
  const A* a;
  const B* b;
  const C* c;
};

// Puts a lane's elements into the whole tile.
template <class T, class Fragment>
void gather(double* tile, const Fragment& part, unsigned lane) {
  for (int i = 0; i < part.num_elements; ++i) tile[part.position(lane, i)] = operand<T>(part.x[i]);
}

}  // namespace detail

template <int m, int n, int k, class T, class LayoutA, class LayoutB, class C>
void mma_sync(fragment<accumulator, m, n, k, C>& d, const fragment<matrix_a, m, n, k, T, LayoutA>& a,
              const fragment<matrix_b, m, n, k, T, LayoutB>& b, const fragment<accumulator, m, n, k, C>& c,
              EMULATOR_SITE) {
  static_assert(std::is_same_v<C, double> == std::is_same_v<T, double>, "float accumulates, double for double");
  using Lane = detail::Operands<std::decay_t<decltype(a)>, std::decay_t<decltype(b)>, std::decay_t<decltype(c)>>;
  Lane mine{&d, &a, &b, &c};
  emulator::warp_collective(
      "mma_sync", 0xffffffff, &mine,
      [](void* const* lanes, unsigned) {
        double a[m * k], b[k * n], c[m * n];
        for (unsigned i = 0; i < 32; ++i) {
          const Lane& lane = *static_cast<const Lane*>(lanes[i]);
          detail::gather<T>(a, *lane.a, i);
          detail::gather<T>(b, *lane.b, i);
          detail::gather<C>(c, *lane.c, i);
        }
        emulator::tile_product(a, b, c, m, n, k, detail::kExactProducts<T>);
        for (unsigned i = 0; i < 32; ++i) {
          auto& d = *static_cast<const Lane*>(lanes[i])->d;
          for (int j = 0; j < d.num_elements; ++j) d.x[j] = static_cast<C>(c[d.position(i, j)]);
        }
      },
      site);
}

// Rounds to the nearest, ties away from zero, as cvt.rna.tf32.f32.
inline float __float_to_tf32(float value) {
  std::uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if ((word & 0x7f800000) != 0x7f800000) word = (word + 0x1000) & 0xffffe000;
  std::memcpy(&value, &word, sizeof word);
  return value;
}

}  // namespace nvcuda::wmma
