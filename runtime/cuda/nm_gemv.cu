// y = x Wᵀ for a few tokens; W keeps the same count of every 32 columns (runtime/nm/nm_gemv_packing.py has the layout).
//
// A lane owns one row of a tile of 32. All lanes of a warp are in the same 32 columns, so what they gather from shared
// memory lies in different banks or is the same word. A warp takes every (WARPS)-th chunk of 128 columns, keeps its x
// in shared memory of its own and the next chunk's weights in flight; no barrier but the last, where sums are added.
//
// Defines: KEPT of every 32 (even), TOKENS a pass (1, 2, 4, 8), WARPS a block, SPLIT blocks a cluster, BF16, ACTIVATION.
// Grid (tiles * SPLIT, passes), WARPS * 32 threads, dynamic shared memory WARPS * TOKEN_WORDS * 512 bytes, at least
// WARPS * TOKENS * 128.
#include "ptx.cuh"
#include "epilogue.cuh"
#include "offsets.cuh"
#include "input_words.cuh"
#include "row_sums.cuh"

constexpr int LOADS = 1 + KEPT / 2;                     // uint4 a lane and chunk: four masks, then the values
// At 50 % and one or two tokens 64 registers are enough: 32 warps a multiprocessor, so that 14336 rows make one wave.
constexpr int LEAST_BLOCKS = KEPT <= 16 && TOKENS <= 2 ? 32 / WARPS : 1;
constexpr int TOKEN_WORDS = TOKENS == 1 ? 1 : TOKENS / 2;  // words a column of x: one float32, or pairs of tokens

__device__ __forceinline__ u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

__device__ __forceinline__ void keep_inputs(u8* mine, int lane, const uint2 (&words)[TOKENS]) {
#if TOKENS == 1
  ((float4*)mine)[lane] = as_floats(words[0]);
#else
#pragma unroll
  for (int t = 0; t < TOKENS; t += 2) ((uint4*)(mine + 256 * t))[lane] = as_pairs(words[t], words[t + 1]);
#endif
}

__device__ __forceinline__ void add_product(float (&sums)[TOKENS], float value, const u8* x) {
#if TOKENS == 1
  sums[0] = fmaf(value, *(const float*)x, sums[0]);
#else
#pragma unroll
  for (int t = 0; t < TOKENS; t += 2) {
    const float2 pair = to_float2(*(const u32*)(x + 256 * t));
    sums[t] = fmaf(value, pair.x, sums[t]);
    sums[t + 1] = fmaf(value, pair.y, sums[t + 1]);
  }
#endif
}

// One row's kept columns of one group: `changes` has a 1 at its top after the first step, and differs from the bit
// above at each kept column, so one instruction finds the next and one shift brings it to the top.
struct Walk {
  u32 changes;
  u32 place;  // bytes from the group's first column
};

template <bool First>
__device__ __forceinline__ void step(Walk& walk) {
  const u32 further = First ? first_one(walk.changes) : next_change(walk.changes);
  walk.changes <<= further;
  walk.place += 4 * further;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, LEAST_BLOCKS)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
    nm_gemv(const uint4* __restrict__ weights, const u16* __restrict__ x, const u16* __restrict__ bias,
            u16* __restrict__ y, int tokens, int out, int columns, int chunks) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile = blockIdx.x / SPLIT, block = blockIdx.x % SPLIT, token = blockIdx.y * TOKENS;
  const int share = (chunks + SPLIT - 1) / SPLIT, last = min(chunks, (block + 1) * share);
  u8* mine = shared_memory() + warp * (TOKEN_WORDS * 512);
  const uint4* source = weights + (size_t)tile * chunks * (LOADS * 32) + lane;

  int chunk = block * share + warp;
  uint4 held[LOADS];
  uint2 inputs[TOKENS];
  if (chunk < last) {
#pragma unroll
    for (int j = 0; j < LOADS; j++) held[j] = load_once(source + ((size_t)chunk * LOADS + j) * 32);
    load_columns(inputs, x, token, tokens, chunk * 128 + lane * 4, columns);
  }
  float sums[TOKENS] = {};
  for (; chunk < last; chunk += WARPS) {
    const bool more = chunk + WARPS < last;
    const uint4* next = source + (size_t)(chunk + WARPS) * (LOADS * 32);
    const uint4 masks = held[0];
    __syncwarp();  // all lanes are done with the chunk before
    keep_inputs(mine, lane, inputs);
    __syncwarp();
    if (more) {
      held[0] = load_once(next);
      load_columns(inputs, x, token, tokens, (chunk + WARPS) * 128 + lane * 4, columns);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {  // two groups at a time: two independent chains of steps
      Walk walks[2] = {{word_of(masks, 2 * half), 0}, {word_of(masks, 2 * half + 1), 0}};
#pragma unroll
      for (int k = 0; k < KEPT / 2; k++) {
#pragma unroll
        for (int g = 0; g < 2; g++) {
          const int word = (2 * half + g) * (KEPT / 2) + k;
          const float2 values = to_float2(word_of(held[1 + word / 4], word % 4));
          const u8* group = mine + (2 * half + g) * 128;
          if (k == 0) step<true>(walks[g]);
          else step<false>(walks[g]);
          add_product(sums, values.x, group + walks[g].place);
          step<false>(walks[g]);
          add_product(sums, values.y, group + walks[g].place);
        }
      }
#pragma unroll
      for (int j = 1; j < LOADS; j++)  // what this half was the last to use
        if (4 * j <= (half + 1) * KEPT && 4 * j > half * KEPT && more) held[j] = load_once(next + j * 32);
    }
  }
  __syncthreads();  // the sums overwrite x
  store_rows(sums, (float*)shared_memory(), nullptr, bias, y, tile, token, tokens, out);
}
