// y = activation(x Wᵀ + bias) for few tokens, W in kept tiles: every kept value is read once, straight into registers.
//
// A step is 32 columns of a tile row: PARTS grains of 32 / PARTS columns, each anywhere. A warp takes BANDS times
// eight rows of it: lane 4 q + c holds eight values of row q of each, and the same eight columns of x of the tokens q
// and q + 8, as operands of the tensor core (which columns a lane holds is free as long as both operands agree).
// Tokens are the instruction's 16 rows, so tiles of eight rows waste nothing.
// The steps of a tile row go round the warps of a block and the SPLIT blocks of a cluster; their sums are added in
// that order, so results repeat to the bit.
//
// ROWS rows of a tile row; BANDS divides ROWS / 8; PARTS 1, 2 or 4; TOKENS 8, 16 or 32 a block; UNROLL steps in flight.
#include "ptx.cuh"
#include "epilogue.cuh"

#if SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

const int HALVES = TOKENS == 8 ? 1 : 2;        // of the instruction's 16 tokens, those in use
const int GROUPS = (TOKENS + 15) / 16;         // instructions a step and band
const int HEIGHT = BANDS * 8;                  // rows of a block
const int PITCH = BANDS == 1 ? 8 : HEIGHT + 8; // of the sums in shared memory, without bank conflicts
const int GRAIN = 32 / PARTS;

// The lane's eight values of one token at a step: 8 / PARTS of each grain.
__device__ __forceinline__ uint4 load_tokens(const u16* x, const int (&column)[PARTS], int c) {
#if PARTS == 1
  return *(const uint4*)(x + (column[0] * GRAIN + c * 8));
#elif PARTS == 2
  const uint2 low = *(const uint2*)(x + (column[0] * GRAIN + c * 4));
  const uint2 high = *(const uint2*)(x + (column[1] * GRAIN + c * 4));
  return make_uint4(low.x, low.y, high.x, high.y);
#else
  return make_uint4(*(const u32*)(x + (column[0] * GRAIN + c * 2)), *(const u32*)(x + (column[1] * GRAIN + c * 2)),
                    *(const u32*)(x + (column[2] * GRAIN + c * 2)), *(const u32*)(x + (column[3] * GRAIN + c * 2)));
#endif
}

// sums += the products of one step: `w` the weights of each band, `v` the tokens of each half of a group.
__device__ __forceinline__ void multiply_step(float (&sums)[GROUPS][BANDS][4], const uint4 (&w)[BANDS],
                                              const uint4 (&v)[GROUPS][HALVES]) {
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const uint4 low = v[g][0], high = HALVES == 2 ? v[g][HALVES - 1] : make_uint4(0, 0, 0, 0);
    const u32 first[4] = {low.x, high.x, low.y, high.y}, second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int b = 0; b < BANDS; b++) {
      multiply(sums[g][b], first, w[b].x, w[b].y);
      multiply(sums[g][b], second, w[b].z, w[b].w);
    }
  }
}

// table: first step, steps, place of each tile row; columns: PARTS a step; weights: [step][ROWS / 8][lane], 16 bytes;
// x (tokens, in), in a multiple of GRAIN; y (tokens, out). Blocks: [tokens / TOKENS][tile row][ROWS / HEIGHT][SPLIT].
extern "C" __global__ void __launch_bounds__(WARPS * 32) CLUSTER
    block_decode(const uint4* __restrict__ weights, const int4* __restrict__ table, const int* __restrict__ columns,
                 const u16* __restrict__ x, const u16* __restrict__ bias, u16* __restrict__ y, int tile_rows, int in,
                 int out, int tokens) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane / 4, c = lane % 4;
  const int part = blockIdx.x % SPLIT, units = tile_rows * (ROWS / HEIGHT);
  const int unit = blockIdx.x / SPLIT % units, first_token = blockIdx.x / SPLIT / units * TOKENS;
  const int4 band = table[unit / (ROWS / HEIGHT)];
  const int first_row = band.z * ROWS + unit % (ROWS / HEIGHT) * HEIGHT;
  if (first_row >= out) return;  // rows that pad the last tiles; the same for all blocks of a cluster
  const uint4* own = weights + (size_t)band.x * (ROWS / 8 * 32) + unit % (ROWS / HEIGHT) * (BANDS * 32) + lane;
  const u16* row = x + (size_t)(first_token + q) * in;

  float sums[GROUPS][BANDS][4] = {};
  for (int step = part * WARPS + warp; step < band.y; step += UNROLL * WARPS * SPLIT) {
    int column[UNROLL][PARTS];
    uint4 w[UNROLL][BANDS], v[UNROLL][GROUPS][HALVES];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int here = step + u * WARPS * SPLIT;
#pragma unroll
      for (int p = 0; p < PARTS; p++)
        column[u][p] = here < band.y ? columns[(size_t)(band.x + here) * PARTS + p] : 0;
#pragma unroll
      for (int b = 0; b < BANDS; b++)
        w[u][b] = here < band.y ? load_once(own + (size_t)here * (ROWS / 8 * 32) + b * 32) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++)
#pragma unroll
      for (int t = 0; t < GROUPS * HALVES; t++) {
        const bool used = step + u * WARPS * SPLIT < band.y && first_token + t * 8 + q < tokens;
        v[u][t / HALVES][t % HALVES] =
            used ? load_tokens(row + (size_t)t * 8 * in, column[u], c) : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) multiply_step(sums, w[u], v[u]);
  }

  float* shared = (float*)shared_memory();  // [warp][token][row]
#pragma unroll
  for (int t = 0; t < GROUPS * HALVES; t++)
#pragma unroll
    for (int b = 0; b < BANDS; b++) {
      const float* sum = sums[t / HALVES][b] + t % HALVES * 2;
      *(float2*)(shared + (warp * TOKENS + t * 8 + q) * PITCH + b * 8 + c * 2) = make_float2(sum[0], sum[1]);
    }
  __syncthreads();
#if SPLIT > 1
  for (int i = threadIdx.x; i < TOKENS * HEIGHT; i += WARPS * 32) {
    float* place = shared + i / HEIGHT * PITCH + i % HEIGHT;
    float sum = place[0];
    for (int other = 1; other < WARPS; other++) sum += place[other * TOKENS * PITCH];
    place[0] = sum;
  }
  wait_cluster();
#endif
  for (int i = part * WARPS * 32 + threadIdx.x; i < TOKENS * HEIGHT; i += SPLIT * WARPS * 32) {
    const int token = first_token + i / HEIGHT, at = first_row + i % HEIGHT;
    const float* place = shared + i / HEIGHT * PITCH + i % HEIGHT;
    float sum = 0.0f;
#if SPLIT > 1
    for (int rank = 0; rank < SPLIT; rank++) sum += read_cluster(shared_address(place), rank);
#else
    for (int other = 0; other < WARPS; other++) sum += place[other * TOKENS * PITCH];
#endif
    if (token < tokens && at < out) y[(size_t)token * out + at] = from_float(finish(sum, bias, at));
  }
#if SPLIT > 1
  wait_cluster();  // no block may end while another reads its sums
#endif
}
