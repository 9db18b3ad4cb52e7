// How a lane steps from one kept column of its row to the next, and reads what lies there. tests/emulator/offsets.cuh has
// the same functions in plain C++.
#pragma once

// The place of the first 1 from the top of `word`, 0 to 31. `word` is not 0.
__device__ __forceinline__ u32 first_one(u32 word) {
  u32 places;
  asm("bfind.shiftamt.u32 %0, %1;" : "=r"(places) : "r"(word));
  return places;
}

// How far below the top the first bit is that differs from the top bit: the shift that brings it there. There is one.
__device__ __forceinline__ u32 next_change(u32 word) {
  u32 places;
  asm("bfind.shiftamt.s32 %0, %1;" : "=r"(places) : "r"(word));
  return places;
}

// start + the four bytes of `bytes`, each times the byte of `weights` beside it.
__device__ __forceinline__ u32 weigh_bytes(u32 bytes, u32 weights, u32 start) { return __dp4a(bytes, weights, start); }

// Read at an address in shared memory (shared_address, ptx.cuh), which saves an addition over a pointer and an offset.
__device__ __forceinline__ void load_shared(float& v, u32 shared) {
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(v) : "r"(shared) : "memory");
}
__device__ __forceinline__ void load_shared(u32 (&v)[1], u32 shared) {
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(v[0]) : "r"(shared) : "memory");
}
__device__ __forceinline__ void load_shared(u32 (&v)[2], u32 shared) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];\n" : "=r"(v[0]), "=r"(v[1]) : "r"(shared) : "memory");
}
__device__ __forceinline__ void load_shared(u32 (&v)[4], u32 shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(shared)
               : "memory");
}
