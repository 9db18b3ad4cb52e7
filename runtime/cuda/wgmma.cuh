// Sparse products of a warpgroup (128 threads) on Hopper's tensor cores, compute capability 9.0 with its own features
// (sm_90a). Included after ptx.cuh; tests/emulator/wgmma.cuh has the same functions in plain C++.
//
// Documented (PTX ISA, wgmma.mma_async.sp; the layouts as CUTLASS states them in mma_traits_sm90_gmma_sparse.hpp,
// ALayout_64x32, ELayout_64x32 and CLayout_64xN): warp w of the warpgroup holds rows 16w to 16w + 15 of a and d, and in
// the warp a, the places and d have the lanes and registers of mma.sp.m16n8k32 (multiply_sparse of ptx.cuh).
// Not yet run on hardware.
#pragma once

// ---- order --------------------------------------------------------------------------------------------------------

// Wait for this thread's copies as wait_copies does, and let the tensor cores see what they wrote: they read shared
// memory through another path (the async proxy). A barrier must follow before another thread's product reads it.
template <int Pending>
__device__ __forceinline__ void wait_copies_for_products() {
  asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;\n" ::"n"(Pending) : "memory");
}
// Before a batch of products: what this thread wrote to a, places and d is theirs from here on.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
// Close the batch; wait until at most `Pending` of the newest batches are unfinished.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}
// After the last wait: no use of d moves before this line.
template <int Count>
__device__ __forceinline__ void take_sums(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// Give registers of this warpgroup back to the block, or take them, until each thread has `Count` (24 to 240, by 8). A
// block of three warpgroups starts with 168 each.
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(Count));
}

// ---- the product --------------------------------------------------------------------------------------------------

// Describe b (N tokens x 64 columns of 16 bits, one row of 128 bytes a token) in shared memory for the product below.
// `shared` is where its tile starts, a multiple of 1024, or 64 bytes further for columns 32 to 63. The 16-byte piece h
// of token t lies at 128 t + 16 (h ^ (t % 8)).
__device__ __forceinline__ u64 describe(u32 shared) {
  const u64 swizzle_128_bytes = 1, bytes_per_8_tokens = 1024;
  return (swizzle_128_bytes << 62) | ((bytes_per_8_tokens >> 4) << 32) | (1u << 16) | ((shared & 0x3ffffu) >> 4);
}

#define WGMMA_TEN(t) \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define WGMMA_NAMES_4 "%0, %1, %2, %3"
#define WGMMA_NAMES_8 WGMMA_NAMES_4 ", %4, %5, %6, %7"
#define WGMMA_NAMES_16 WGMMA_TEN() "%10, %11, %12, %13, %14, %15"
#define WGMMA_NAMES_32 WGMMA_TEN() WGMMA_TEN(1) WGMMA_TEN(2) "%30, %31"
#define WGMMA_NAMES_64 WGMMA_TEN() WGMMA_TEN(1) WGMMA_TEN(2) WGMMA_TEN(3) WGMMA_TEN(4) WGMMA_TEN(5) "%60, %61, %62, %63"
#define WGMMA_NAMES_128                                                                                      \
  WGMMA_TEN() WGMMA_TEN(1) WGMMA_TEN(2) WGMMA_TEN(3) WGMMA_TEN(4) WGMMA_TEN(5) WGMMA_TEN(6) WGMMA_TEN(7)     \
  WGMMA_TEN(8) WGMMA_TEN(9) WGMMA_TEN(10) WGMMA_TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_8(i) WGMMA_SUMS_4(i), WGMMA_SUMS_4(i + 4)
#define WGMMA_SUMS_16(i) WGMMA_SUMS_8(i), WGMMA_SUMS_8(i + 8)
#define WGMMA_SUMS_32(i) WGMMA_SUMS_16(i), WGMMA_SUMS_16(i + 16)
#define WGMMA_SUMS_64(i) WGMMA_SUMS_32(i), WGMMA_SUMS_32(i + 32)
#define WGMMA_SUMS_128(i) WGMMA_SUMS_64(i), WGMMA_SUMS_64(i + 64)

// d (64 x N) += a (64 x 32, 2 of every 4 columns stored) b (32 x N), begun here and done at wait_products: until then
// neither d, a nor places may be touched, nor b's memory written. d[4j], d[4j + 1]: row lane / 4 of the warp's 16,
// tokens 8j + 2 (lane % 4) and one further; d[4j + 2], d[4j + 3]: 8 rows below. Selector as in multiply_sparse.
template <int Selector, int N>
struct SparseProduct;
#define WGMMA_SPARSE(N, COUNT, A0, A1, A2, A3, B, PLACES, SELECTOR)                                                    \
  template <int Selector>                                                                                              \
  struct SparseProduct<Selector, N> {                                                                                  \
    static __device__ __forceinline__ void begin(float (&d)[COUNT], const uint4& a, const u32& places, u64 b) {        \
      asm volatile("{\n.reg .pred add;\nsetp.eq.u32 add, 0, 0;\n"                                                      \
                   "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." ELEMENT "." ELEMENT " {" WGMMA_NAMES_##COUNT   \
                   "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", %" #PLACES ", %" #SELECTOR                   \
                   ", add, 1, 1, 0;\n}\n"                                                                              \
                   : WGMMA_SUMS_##COUNT(0)                                                                             \
                   : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(places), "n"(Selector)                        \
                   : "memory");                                                                                        \
    }                                                                                                                  \
  };
WGMMA_SPARSE(8, 4, 4, 5, 6, 7, 8, 9, 10)
WGMMA_SPARSE(16, 8, 8, 9, 10, 11, 12, 13, 14)
WGMMA_SPARSE(32, 16, 16, 17, 18, 19, 20, 21, 22)
WGMMA_SPARSE(64, 32, 32, 33, 34, 35, 36, 37, 38)
WGMMA_SPARSE(128, 64, 64, 65, 66, 67, 68, 69, 70)
WGMMA_SPARSE(256, 128, 128, 129, 130, 131, 132, 133, 134)

// ---- whole runs of bytes, counted by a barrier ----------------------------------------------------------------------

// A barrier is 8 bytes of shared memory. Its phase ends when `arrivals` threads have arrived and all bytes that were
// expected have been copied; then the next begins. After start_barrier all blocks of the cluster wait before use.
__device__ __forceinline__ void start_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;\n" ::"r"(barrier),
               "r"(arrivals)
               : "memory");
}
// Arrive, and have the phase wait for `bytes` more.
__device__ __forceinline__ void expect_bytes(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// Arrive at the barrier at the same place in block `rank` of the cluster, after this thread's reads and writes.
__device__ __forceinline__ void arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Wait for the end of phase number `phase` of the barrier, from 0; the one before must have ended.
__device__ __forceinline__ void wait_barrier(u32 barrier, int phase) {
  asm volatile(
      "{\n.reg .pred done;\nwait_again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_again;\n}\n" ::"r"(barrier),
      "r"(phase & 1)
      : "memory");
}
// Copy `bytes`, a multiple of 16, between 16-byte aligned places, and count them at the barrier.
__device__ __forceinline__ void copy_run(u32 shared, const void* global, int bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier)
      : "memory");
}
// The same to this place in every block of the cluster whose bit of `blocks` is set, counted at its own barrier.
__device__ __forceinline__ void copy_run_to_all(u32 shared, const void* global, int bytes, u32 barrier, u32 blocks) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;\n"
      ::"r"(shared), "l"(global), "r"(bytes), "r"(barrier), "h"((u16)blocks)
      : "memory");
}
