// The instructions that our kernels are built from, one small function each, and the 16-bit type they work in.
// Nothing else in runtime/cuda holds inline PTX, but wgmma.cuh. tests/emulator/ptx.cuh has the same functions in plain
// C++, so that every kernel's indexing, staging and synchronisation is run and checked on a CPU.
//
// BF16: 0 = float16, 1 = bfloat16 (both are moved as u16, pairs as u32, the lower column in the lower half).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef BF16
#define BF16 0
#endif
#if BF16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

// ---- memory -------------------------------------------------------------------------------------------------------

// The block's dynamic shared memory, 1024-byte aligned. Kernels declare no other shared memory.
__device__ __forceinline__ u8* shared_memory() {
  extern __shared__ __align__(1024) u8 dynamic_shared_memory[];
  return dynamic_shared_memory;
}

// The address that copy_async, load_matrix and descriptors take, of a place in shared memory.
__device__ __forceinline__ u32 shared_address(const void* place) {
  return (u32)__cvta_generic_to_shared(place);
}

// Read 16 or 4 bytes that no other thread will read: past L1, first to leave L2.
__device__ __forceinline__ uint4 load_once(const uint4* place) { return __ldcs(place); }
__device__ __forceinline__ uint2 load_once(const uint2* place) { return __ldcs(place); }
__device__ __forceinline__ u32 load_once(const u32* place) { return __ldcs(place); }

// Copy 16 bytes from global to shared memory in the background, both 16-byte aligned; bytes beyond `valid` become 0.
// copy_async skips L1 (weights, read once); copy_async_kept goes through it (x, read by every block).
__device__ __forceinline__ void copy_async(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_async_kept(u32 shared, const void* global, int valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared), "l"(global), "r"(valid) : "memory");
}
// Close the group of this thread's copies so far; wait until at most `Pending` of the newest groups are unfinished.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, 16 bytes, and receives
// in r[m] the two elements at row l / 4, columns 2 (l % 4) and one further, of matrix m.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared)
               : "memory");
}

// ---- bits ---------------------------------------------------------------------------------------------------------

// Bytes of (b : a), byte i of the result chosen by nibble i of `selector`: 0-3 from a, 4-7 from b; 8 added to a nibble
// replicates the sign bit of the chosen byte instead (which __byte_perm masks away).
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// The low 32 bits of (high : low) >> min(count, 32); the high 32 bits of (high : low) << min(count, 32).
__device__ __forceinline__ u32 shift_right(u32 low, u32 high, u32 count) { return __funnelshift_rc(low, high, count); }
__device__ __forceinline__ u32 shift_left(u32 low, u32 high, u32 count) { return __funnelshift_lc(low, high, count); }

// ---- numbers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(u16 v) {
  float f;
#if BF16
  f = __uint_as_float((u32)v << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
#endif
  return f;
}
__device__ __forceinline__ float2 to_float2(u32 pair) {
  return make_float2(to_float((u16)(pair & 0xffffu)), to_float((u16)(pair >> 16)));
}
// Round to nearest, ties to even.
__device__ __forceinline__ u16 from_float(float f) {
  u16 v;
  asm("cvt.rn." ELEMENT ".f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}

// ---- tensor cores: d += a b, accumulated in float32 -----------------------------------------------------------------

// d (16 x 8) += a (16 x 16) b (16 x 8). Lane l, q = l / 4, c = l % 4: a[0] row q, columns 2c, 2c + 1; a[1] row q + 8;
// a[2] row q, columns 2c + 8, 2c + 9; a[3] row q + 8 of them; b[0] rows 2c, 2c + 1, column q; b[1] rows 2c + 8, 2c + 9;
// d[0], d[1] row q, columns 2c, 2c + 1; d[2], d[3] row q + 8.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT "." ELEMENT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16 x 8) += a (16 x 32, 2 of every 4 columns stored) b (32 x 8). a holds the stored values, (16 x 16), as in
// `multiply`; b[j] holds rows 8j + 2c, 8j + 2c + 1 of column q. `places` of lanes c = 2 Selector and 2 Selector + 1:
// the 2-bit places of the kept values, for lane 2 Selector of columns 0-15, for the next of columns 16-31; row q in the
// low half, row q + 8 in the high half; 4 bits a group of four columns, the first kept one in the lower two.
template <int Selector>
__device__ __forceinline__ void multiply_sparse(float (&d)[4], const uint4& a, const u32 (&b)[4], u32 places) {
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." ELEMENT "." ELEMENT
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(places),
                 "n"(Selector));
}

// ---- clusters of blocks (compute capability 9.0) --------------------------------------------------------------------

// Wait for every thread of every block of the cluster; what they wrote to shared memory before is visible after. The
// lanes of a warp must arrive as one (.aligned), also after a loop that some of them have left earlier.
__device__ __forceinline__ void wait_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// The float at `shared` (an address of this block) in block `rank` of the cluster.
__device__ __forceinline__ float read_cluster(u32 shared, u32 rank) {
  u32 remote;
  float value;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(remote) : "r"(shared), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(remote) : "memory");
  return value;
}
