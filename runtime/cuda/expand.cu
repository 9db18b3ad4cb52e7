// A dense weight from its keep mask and kept values: one warp for 1024 columns of a row, 64 columns at a time, so that
// values are read and entries written side by side.
//
// Defines: WARPS a block, ELEMENT_BITS of a value (16 or 32). Grid: ceil(rows * chunks / WARPS) blocks, no shared memory.
#include "ptx.cuh"

#if ELEMENT_BITS == 16
typedef u16 Element;
typedef u32 Pair;
__device__ __forceinline__ Pair make_pair(Element low, Element high) { return low | (u32)high << 16; }
#else
typedef u32 Element;
typedef uint2 Pair;
__device__ __forceinline__ Pair make_pair(Element low, Element high) { return make_uint2(low, high); }
#endif

// `keep` (rows, words): bit i of word j keeps column 32 j + i. `starts` (rows, chunks): where in `values` the kept entries
// of 1024 columns begin. `dense` (rows, stride), stride even: all of it is written, zeros beyond the last kept column.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    expand(const Element* values, const u32* keep, const u64* starts, Element* dense, int rows, int words, int chunks,
           int stride) {
  const int lane = threadIdx.x % 32;
  const u64 item = (u64)blockIdx.x * WARPS + threadIdx.x / 32;
  if (item >= (u64)rows * chunks) return;
  const u64 row = item / chunks;
  const int chunk = (int)(item % chunks), place = chunk * 32 + lane;
  const u32 word = place < words ? keep[row * words + place] : 0;
  u32 sum = __popc(word);  // kept up to and including this lane's word
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= by) sum += other;
  }
  const u32 before = sum - __popc(word);
  const Element* source = values + starts[item];
  Pair* target = (Pair*)(dense + row * stride + chunk * 1024) + lane;
#pragma unroll 4
  for (int i = 0; i < 16; i++) {  // a lane writes columns 2 lane and 2 lane + 1 of 64
    const int from = 2 * i + lane / 16, bit = lane % 16 * 2;
    const u32 bits = __shfl_sync(0xffffffffu, word, from), start = __shfl_sync(0xffffffffu, before, from);
    const u32 first = start + __popc(bits & ((1u << bit) - 1)), here = bits >> bit & 3;
    const Element low = here & 1 ? source[first] : 0, high = here & 2 ? source[first + (here & 1)] : 0;
    if (chunk * 1024 + i * 64 + lane * 2 < stride) target[i * 32] = make_pair(low, high);
  }
}
