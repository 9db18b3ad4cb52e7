// The functions of runtime/cuda/ptx.cuh in plain C++: see there for what each one does.
#pragma once

#ifndef BF16
#define BF16 0
#endif

// ---- memory ---------------------------------------------------------------------------------------------------------

inline u8* shared_memory() { return emulator::shared_base(); }
inline u32 shared_address(const void* place) { return emulator::shared_to_address(place); }

inline uint4 load_once(const uint4* place) { return __ldcs(place); }
inline uint2 load_once(const uint2* place) { return __ldcs(place); }
inline u32 load_once(const u32* place) { return __ldcs(place); }

inline void copy_async(u32 shared, const void* global) { emulator::copy_later(shared, global, 16, "copy_async"); }
inline void copy_async_kept(u32 shared, const void* global, int valid) {
  emulator::copy_later(shared, global, valid, "copy_async_kept");
}
inline void commit_copies() { emulator::close_copies(); }
template <int Pending>
inline void wait_copies() {
  emulator::finish_copies(Pending);
}

namespace emulator {

struct LoadMatrices {
  const u8* row;
  u32* r;
};

inline void load_matrices(void** slots, u32) {
  for (int m = 0; m < 4; m++)
    for (int lane = 0; lane < 32; lane++)
      __builtin_memcpy(&((LoadMatrices*)slots[lane])->r[m],
                       ((LoadMatrices*)slots[8 * m + lane / 4])->row + 4 * (lane % 4), 4);
}

}  // namespace emulator

inline void load_matrices(u32 (&r)[4], u32 shared, int line = __builtin_LINE()) {
  emulator::LoadMatrices slot = {emulator::shared_place(shared, 16, 16, "load_matrices"), r};
  emulator::meet(emulator::warp_scope, ~0u, "load_matrices", line, emulator::load_matrices, &slot);
}

// ---- bits -----------------------------------------------------------------------------------------------------------

inline u32 permute(u32 a, u32 b, u32 selector) {
  const u64 both = ((u64)b << 32) | a;
  u32 d = 0;
  for (int i = 0; i < 4; i++) {
    const u32 nibble = (selector >> (4 * i)) & 15, byte = (u32)(both >> (8 * (nibble & 7))) & 0xff;
    d |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return d;
}
inline u32 shift_right(u32 low, u32 high, u32 count) { return __funnelshift_rc(low, high, count); }
inline u32 shift_left(u32 low, u32 high, u32 count) { return __funnelshift_lc(low, high, count); }

// ---- numbers --------------------------------------------------------------------------------------------------------

namespace emulator {

// 5 exponent bits, 10 of fraction; the quiet bit of a NaN is set, as the hardware does.
inline float half_to_float(u16 v) {
  const u32 sign = (u32)(v & 0x8000u) << 16, exponent = (v >> 10) & 31u, fraction = v & 0x3ffu;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u));
  if (exponent != 0) return __uint_as_float(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float small = (float)fraction * (1.0f / 16777216.0f);
  return sign ? -small : small;
}

// Drop the lowest `count` bits of v, to nearest, ties to even.
inline u32 round_away(u32 v, u32 count) {
  if (count > 31) return 0;
  const u32 kept = v >> count, rest = v & ((1u << count) - 1), half = 1u << (count - 1);
  return kept + (rest > half || (rest == half && (kept & 1)));
}

inline u16 float_to_half(float f) {
  const u32 bits = __float_as_uint(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x47800000u) return (u16)(sign | 0x7c00u);  // 65536 and above
  if (magnitude >= 0x38800000u) return (u16)(sign | round_away(magnitude - (112u << 23), 13));  // normal in half
  const u32 exponent = magnitude >> 23;  // below 113: a multiple of 2^-24
  return (u16)(sign | (exponent < 102 ? 0 : round_away((magnitude & 0x7fffffu) | 0x800000u, 126 - exponent)));
}

inline u16 float_to_bfloat(float f) {
  const u32 bits = __float_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return (u16)(((bits >> 31) << 15) | round_away(bits & 0x7fffffffu, 16));
}

}  // namespace emulator

inline float to_float(u16 v) { return BF16 ? __uint_as_float((u32)v << 16) : emulator::half_to_float(v); }
inline float2 to_float2(u32 pair) { return make_float2(to_float((u16)(pair & 0xffffu)), to_float((u16)(pair >> 16))); }
inline u16 from_float(float f) { return BF16 ? emulator::float_to_bfloat(f) : emulator::float_to_half(f); }

// ---- tensor cores ---------------------------------------------------------------------------------------------------

namespace emulator {

struct Multiply {
  float* d;
  const u32* a;
  const u32* b;
  u32 places;
};

// Stored column s of row r of a meets row from[r][s] of b. Products are exact in double and summed there; the hardware's
// order in float32 is within every test's bound.
inline void accumulate(void** slots, const float (&a)[16][16], const int (&from)[16][16], const float (&b)[32][8]) {
  for (int lane = 0; lane < 32; lane++) {
    float* d = ((Multiply*)slots[lane])->d;
    for (int j = 0; j < 4; j++) {
      const int row = lane / 4 + 8 * (j / 2), column = 2 * (lane % 4) + j % 2;
      double sum = d[j];
      for (int s = 0; s < 16; s++) sum += (double)a[row][s] * (double)b[from[row][s]][column];
      d[j] = (float)sum;
    }
  }
}

// The registers of all lanes as matrices: a (16 x 16) and, 8 rows for each register, b.
inline void gather(float (&a)[16][16], float (&b)[32][8], void** slots, int b_registers) {
  for (int lane = 0; lane < 32; lane++) {
    const Multiply* own = (const Multiply*)slots[lane];
    const int q = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; i++) {
      const float2 pair = to_float2(own->a[i]);
      const int row = q + 8 * (i % 2), column = 2 * c + 8 * (i / 2);
      a[row][column] = pair.x, a[row][column + 1] = pair.y;
    }
    for (int i = 0; i < b_registers; i++) {
      const float2 pair = to_float2(own->b[i]);
      b[8 * i + 2 * c][q] = pair.x, b[8 * i + 2 * c + 1][q] = pair.y;
    }
  }
}

inline void multiply(void** slots, u32) {
  float a[16][16], b[32][8];
  int from[16][16];
  gather(a, b, slots, 2);
  for (int row = 0; row < 16; row++)
    for (int s = 0; s < 16; s++) from[row][s] = s;
  accumulate(slots, a, from, b);
}

template <int Selector>
void multiply_sparse(void** slots, u32) {
  float a[16][16], b[32][8];
  int from[16][16];
  gather(a, b, slots, 4);
  for (int row = 0; row < 16; row++)
    for (int g = 0; g < 8; g++) {
      const u32 word = ((const Multiply*)slots[4 * (row % 8) + 2 * Selector + g / 4])->places;
      const u32 bits = (word >> (16 * (row / 8) + 4 * (g % 4))) & 15u, first = bits & 3u, second = bits >> 2;
      if (first >= second)
        fail("multiply_sparse: row %d, group %d has places %u and %u, which do not ascend", row, g, first, second);
      from[row][2 * g] = 4 * g + (int)first, from[row][2 * g + 1] = 4 * g + (int)second;
    }
  accumulate(slots, a, from, b);
}

}  // namespace emulator

inline void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int line = __builtin_LINE()) {
  const u32 b[2] = {b0, b1};
  emulator::Multiply slot = {d, a, b, 0};
  emulator::meet(emulator::warp_scope, ~0u, "multiply", line, emulator::multiply, &slot);
}
template <int Selector>
inline void multiply_sparse(float (&d)[4], const uint4& a, const u32 (&b)[4], u32 places, int line = __builtin_LINE()) {
  static_assert(Selector == 0 || Selector == 1, "lanes 0, 1 or 2, 3 of each four hold the places");
  const u32 values[4] = {a.x, a.y, a.z, a.w};
  emulator::Multiply slot = {d, values, b, places};
  emulator::meet(emulator::warp_scope, ~0u, "multiply_sparse", line, emulator::multiply_sparse<Selector>, &slot);
}

// ---- clusters of blocks ---------------------------------------------------------------------------------------------

inline void wait_cluster(int line = __builtin_LINE()) {
  emulator::meet(emulator::cluster_scope, 0, "wait_cluster", line, nullptr, nullptr);
}
inline float read_cluster(u32 shared, u32 rank) {
  float value;
  __builtin_memcpy(&value, emulator::cluster_place(shared, 4, 4, rank, "read_cluster"), 4);
  return value;
}
