// y = x Wᵀ for a few tokens, any sparsity: each kept value with its distance from the one before
// (runtime/unstructured/bitmap_gemv_packing.py has the layout and the reasons).
//
// A lane owns one row of a tile of 32 rows that keep about as many. The columns are cut into parts whose x fits shared
// memory; the WARPS warps of a block share a part's entries evenly by count, each starting at a stored column. A packet
// is eight entries of every lane: the places of four come out of one word each by one instruction (sums of bytes).
//
// Defines: GAP_BITS 4 or 8, TOKENS a pass (1, 2, 4, 8), WARPS a block, SPLIT blocks a cluster that share the parts, BF16,
// ACTIVATION. Grid (tiles * SPLIT, passes), WARPS * 32 threads, dynamic shared memory max(span * COLUMN_BYTES,
// WARPS * TOKENS * 128) bytes.
#include "ptx.cuh"
#include "epilogue.cuh"
#include "offsets.cuh"
#include "input_words.cuh"
#include "row_sums.cuh"

constexpr int COLUMN_BYTES = TOKENS == 1 ? 4 : 2 * TOKENS;  // of x in shared memory: a float32, or TOKENS 16-bit values
constexpr int PACKET_BYTES = 32 * (16 + GAP_BITS);
constexpr int AHEAD = 4;  // packets in flight

// Eight entries of a lane: values and gaps. 4-bit gaps: the low nibbles of gaps[0] are entries 0-3, the high ones 4-7;
// 8-bit gaps: the bytes of gaps[0] are entries 0-3, of gaps[1] 4-7.
struct Packet {
  uint4 values;
  u32 gaps[2];
};

__device__ __forceinline__ Packet load_packet(const u8* place, int lane) {
  Packet packet;
  packet.values = load_once((const uint4*)place + lane);
#if GAP_BITS == 4
  packet.gaps[0] = load_once((const u32*)(place + 512) + lane);
  packet.gaps[1] = 0;
#else
  const uint2 bytes = load_once((const uint2*)(place + 512) + lane);
  packet.gaps[0] = bytes.x;
  packet.gaps[1] = bytes.y;
#endif
  return packet;
}

__device__ __forceinline__ void add_product(float (&sums)[TOKENS], float value, u32 x) {
#if TOKENS == 1
  float input;
  load_shared(input, x);
  sums[0] = fmaf(value, input, sums[0]);
#else
  u32 words[TOKENS / 2];
  load_shared(words, x);
#pragma unroll
  for (int t = 0; t < TOKENS; t += 2) {
    const float2 inputs = to_float2(words[t / 2]);
    sums[t] = fmaf(value, inputs.x, sums[t]);
    sums[t + 1] = fmaf(value, inputs.y, sums[t + 1]);
  }
#endif
}

// Four entries, `values` two and two, `gaps` their distances. `place`, the address of x at the entry before, moves on.
__device__ __forceinline__ void add_four(float (&sums)[TOKENS], u32 low, u32 high, u32 gaps, u32& place) {
  constexpr u32 E = COLUMN_BYTES;
  const float2 first = to_float2(low), second = to_float2(high);
  add_product(sums, first.x, weigh_bytes(gaps, E, place));
  add_product(sums, first.y, weigh_bytes(gaps, E * 0x0101u, place));
  add_product(sums, second.x, weigh_bytes(gaps, E * 0x010101u, place));
  place = weigh_bytes(gaps, E * 0x01010101u, place);
  add_product(sums, second.y, place);
}

__device__ __forceinline__ void add_packet(float (&sums)[TOKENS], const Packet& packet, u32& place) {
#if GAP_BITS == 4
  const u32 low = packet.gaps[0] & 0x0f0f0f0fu, high = (packet.gaps[0] >> 4) & 0x0f0f0f0fu;
#else
  const u32 low = packet.gaps[0], high = packet.gaps[1];
#endif
  add_four(sums, packet.values.x, packet.values.y, low, place);
  add_four(sums, packet.values.z, packet.values.w, high, place);
}

// x of four neighbouring columns of a part, `words` at most 16 bytes a column.
__device__ __forceinline__ void keep_columns(uint4* place, const uint2 (&words)[TOKENS]) {
#if TOKENS == 1
  *(float4*)place = as_floats(words[0]);
#else
  uint4 pairs[TOKENS / 2];  // pairs[t], word c: tokens 2t and 2t + 1 of column c
#pragma unroll
  for (int t = 0; t < TOKENS / 2; t++) pairs[t] = as_pairs(words[2 * t], words[2 * t + 1]);
#if TOKENS == 2
  place[0] = pairs[0];
#elif TOKENS == 4
  place[0] = make_uint4(pairs[0].x, pairs[1].x, pairs[0].y, pairs[1].y);
  place[1] = make_uint4(pairs[0].z, pairs[1].z, pairs[0].w, pairs[1].w);
#else
  place[0] = make_uint4(pairs[0].x, pairs[1].x, pairs[2].x, pairs[3].x);
  place[1] = make_uint4(pairs[0].y, pairs[1].y, pairs[2].y, pairs[3].y);
  place[2] = make_uint4(pairs[0].z, pairs[1].z, pairs[2].z, pairs[3].z);
  place[3] = make_uint4(pairs[0].w, pairs[1].w, pairs[2].w, pairs[3].w);
#endif
#endif
}

__device__ __forceinline__ void keep_part(u8* room, const u16* x, int token, int tokens, int column, int span,
                                          int columns) {
#pragma unroll 2
  for (int i = 4 * threadIdx.x; i < span; i += 4 * WARPS * 32) {
    uint2 words[TOKENS];
    load_columns(words, x, token, tokens, column + i, columns);
    keep_columns((uint4*)(room + i * COLUMN_BYTES), words);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
    bitmap_gemv(const u8* packets, const u16* firsts, const int* starts, const int* rows, const u16* x, const u16* bias,
                u16* y, int tokens, int out, int columns, int span, int parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tile = blockIdx.x / SPLIT, token = blockIdx.y * TOKENS;
  u8* room = shared_memory();
  float sums[TOKENS] = {};
  for (int part = blockIdx.x % SPLIT; part < parts; part += SPLIT) {
    const int item = tile * parts + part, start = starts[item], count = starts[item + 1] - start;
    const int first = count * warp / WARPS;
    int left = count * (warp + 1) / WARPS - first;
    const u8* here = packets + (size_t)(start + first) * PACKET_BYTES;
    Packet held[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (j < left) held[j] = load_packet(here + j * PACKET_BYTES, lane);
    u32 place = shared_address(room) + firsts[((size_t)item * WARPS + warp) * 32 + lane] * COLUMN_BYTES;
    if (part >= SPLIT) __syncthreads();  // the part before is done with x
    keep_part(room, x, token, tokens, part * span, span, columns);
    __syncthreads();
    for (; left > AHEAD; left -= AHEAD) {
      here += AHEAD * PACKET_BYTES;
#pragma unroll
      for (int j = 0; j < AHEAD; j++) {
        add_packet(sums, held[j], place);
        if (AHEAD + j < left) held[j] = load_packet(here + j * PACKET_BYTES, lane);
      }
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++)
      if (j < left) add_packet(sums, held[j], place);
  }
  __syncthreads();  // the sums overwrite x
  store_rows(sums, (float*)room, rows, bias, y, tile, token, tokens, out);
}
