// CUDA's vector types, with CUDA's alignment.
#pragma once

#define EMULATOR_VECTOR_TYPES(T, name)                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                 \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };           \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTOR_TYPES(signed char, char)
EMULATOR_VECTOR_TYPES(unsigned char, uchar)
EMULATOR_VECTOR_TYPES(short, short)
EMULATOR_VECTOR_TYPES(unsigned short, ushort)
EMULATOR_VECTOR_TYPES(int, int)
EMULATOR_VECTOR_TYPES(unsigned, uint)
EMULATOR_VECTOR_TYPES(float, float)
#undef EMULATOR_VECTOR_TYPES

#define EMULATOR_PAIR(T, name) \
  struct alignas(16) name {    \
    T x, y;                    \
  };                           \
  inline name make_##name(T x, T y) { return {x, y}; }
EMULATOR_PAIR(double, double2)
EMULATOR_PAIR(long long, longlong2)
EMULATOR_PAIR(unsigned long long, ulonglong2)
#undef EMULATOR_PAIR

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
