// y = activation(x Wᵀ + bias) with 2:4 weights as records of 16 rows x 64 columns (runtime/nm/fragments.py), by mma.sp.
//
// Both functions give a block TILES row tiles a warp and TOKENS tokens; the blocks of a cluster share the columns and
// add their sums in the order of their ranks, through each other's shared memory, so results repeat bit for bit.
//   nm24_direct: all warps of a block have the same rows and take turns at the columns. Weights go from memory to
//     registers; x goes through a ring in shared memory that is each warp's own, so no warp waits for another.
//   nm24_staged: every warp has its own rows and all columns of the block. Weights and x go through STAGES stages of
//     STEPS * 64 columns; the warps share x.
// Defines: BF16, ACTIVATION, TILES, WARPS, STAGES, STEPS, TOKENS (a multiple of 8), CLUSTER, BLOCKS (per processor).
// y (tokens, out); packed (ceil(out / 16), steps, 1152 bytes); x (tokens, columns), columns a multiple of 8, zeros
// beyond in; bias (out) or null; steps = ceil(in / 64). grid: row blocks x token tiles, CLUSTER, 1.
#include "ptx.cuh"
#include "epilogue.cuh"

#define THREADS (WARPS * 32)
#define RECORD 1152
#define GROUPS (TOKENS / 8)
#define X_BYTES (TOKENS * 128)  // of 64 columns

#if CLUSTER > 1
#define CLUSTERED __cluster_dims__(1, CLUSTER, 1)
#else
#define CLUSTERED
#endif

// Rows of sums in shared memory lie one after the other for a token; 4 more floats keep the four tokens that a quad
// of lanes writes at once on different banks.
#define PITCH(rows) (rows + 4)

// Where row h of 16 bytes (8 columns) of token t lies in a ring or a stage: the eight rows that ldmatrix reads at once
// come from eight tokens, and must lie on different banks.
__device__ __forceinline__ u32 x_place(int t, int h) { return (u32)(t * 128 + ((h ^ (t & 7)) << 4)); }

// The registers b of 64 columns of one group of 8 tokens.
__device__ __forceinline__ void load_x(u32 (&b)[2][4], u32 x_shared, int group, int lane) {
  const int t = group * 8 + (lane & 7), h = lane >> 3;
  load_matrices(b[0], x_shared + x_place(t, h));
  load_matrices(b[1], x_shared + x_place(t, 4 + h));
}

// Begin to copy 64 columns of x; rows past `tokens` are left as they are, since no output depends on them.
template <int Threads>
__device__ __forceinline__ void copy_x(u32 x_shared, const u16* x, int thread, int tokens, int columns, int step) {
#pragma unroll
  for (int i = 0; i < (TOKENS * 8 + Threads - 1) / Threads; i++) {
    const int piece = thread + i * Threads, t = piece >> 3, h = piece & 7, column = step * 64 + h * 8;
    if (piece < TOKENS * 8 && t < tokens)
      copy_async_kept(x_shared + x_place(t, h), x + (size_t)t * columns + (column < columns ? column : 0),
                      column < columns ? 16 : 0);
  }
}

// Put a warp's sums where `finish_rows` reads them.
__device__ __forceinline__ void store_sums(float* sums, int pitch, const float (&d)[TILES][GROUPS][4], int lane) {
  const int q = lane >> 2, c = lane & 3;
#pragma unroll
  for (int r = 0; r < TILES; r++)
#pragma unroll
    for (int n = 0; n < GROUPS; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[(n * 8 + 2 * c + (j & 1)) * pitch + r * 16 + q + (j >> 1) * 8] = d[r][n][j];
}

// Add the cluster's sums (Rows x tokens, each block's at `sums`), finish and write this block's share of them.
template <int Rows>
__device__ __forceinline__ void finish_rows(u16* y, const float* sums, const u16* bias, int first_row, int out,
                                            int tokens) {
#if CLUSTER > 1
  wait_cluster();
#endif
  for (int i = (int)(blockIdx.y * THREADS + threadIdx.x); i < Rows * tokens; i += CLUSTER * THREADS) {
    const int t = i / Rows, local = i % Rows, row = first_row + local;
#if CLUSTER > 1
    const u32 place = shared_address(sums + t * PITCH(Rows) + local);
    float parts[CLUSTER], sum = 0.0f;
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) parts[rank] = read_cluster(place, rank);
#pragma unroll
    for (int rank = 0; rank < CLUSTER; rank++) sum += parts[rank];
#else
    const float sum = sums[t * PITCH(Rows) + local];
#endif
    if (row < out) y[(size_t)t * out + row] = from_float(finish(sum, bias, row));
  }
#if CLUSTER > 1
  wait_cluster();  // no block may end while another still reads its sums
#endif
}

// This block's share of the steps, and of the tokens.
struct Share {
  int row_block, tokens, first, stop;
};
__device__ __forceinline__ Share share(int steps, int tokens, size_t& first_token) {
  const int tiles = (tokens + TOKENS - 1) / TOKENS, tile = (int)blockIdx.x % tiles;
  first_token = (size_t)tile * TOKENS;
  Share own;
  own.row_block = (int)blockIdx.x / tiles;
  own.tokens = min(TOKENS, tokens - tile * TOKENS);
  own.first = steps * (int)blockIdx.y / CLUSTER;
  own.stop = steps * ((int)blockIdx.y + 1) / CLUSTER;
  return own;
}

#ifdef DIRECT

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS)
    nm24_direct(u16* __restrict__ y, const u8* __restrict__ packed, const u16* __restrict__ x,
                const u16* __restrict__ bias, int out, int columns, int steps, int tokens) {
  constexpr int ROWS = TILES * 16;
  u8* const memory = shared_memory();
  const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
  size_t first_token;
  const Share own = share(steps, tokens, first_token);
  x += first_token * columns;

  // Row tiles past the last are computed as the last one and never written.
  const int last = (out + 15) / 16 - 1;
  const u8* tile[TILES];
#pragma unroll
  for (int r = 0; r < TILES; r++)
    tile[r] = packed + (size_t)min(own.row_block * TILES + r, last) * steps * RECORD;
  const u32 ring = shared_address(memory) + warp * STAGES * X_BYTES;

  uint4 a[STAGES][TILES][2];
  u32 places[STAGES][TILES];
  float d[TILES][GROUPS][4] = {};
  auto begin_weights = [&](int slot, int step) {
    if (step >= own.stop) return;
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      const u8* const record = tile[r] + (size_t)step * RECORD;
      a[slot][r][0] = load_once((const uint4*)record + lane);
      a[slot][r][1] = load_once((const uint4*)record + 32 + lane);
      places[slot][r] = load_once((const u32*)record + 256 + lane);
    }
  };
  auto begin_x = [&](int slot, int step) {
    if (step < own.stop) copy_x<32>(ring + slot * X_BYTES, x, lane, own.tokens, columns, step);
    commit_copies();
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    begin_weights(s, own.first + warp + s * WARPS);
    begin_x(s, own.first + warp + s * WARPS);
  }
  for (int step = own.first + warp; step < own.stop; step += STAGES * WARPS) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      const int now = step + s * WARPS, slot = (s + STAGES - 1) % STAGES;
      if (now >= own.stop) break;
      begin_weights(slot, now + (STAGES - 1) * WARPS);
      wait_copies<STAGES - 2>();
      __syncwarp();  // x of this step is there, and no lane reads the slot that is filled next
      begin_x(slot, now + (STAGES - 1) * WARPS);
#pragma unroll
      for (int n = 0; n < GROUPS; n++) {
        u32 b[2][4];
        load_x(b, ring + s * X_BYTES, n, lane);
#pragma unroll
        for (int r = 0; r < TILES; r++) multiply_sparse<0>(d[r][n], a[s][r][0], b[0], places[s][r]);
#pragma unroll
        for (int r = 0; r < TILES; r++) multiply_sparse<1>(d[r][n], a[s][r][1], b[1], places[s][r]);
      }
    }
  }
  wait_copies<0>();
  __syncthreads();  // the sums take the place of all rings

  float* const sums = (float*)memory;
  store_sums(sums + warp * TOKENS * PITCH(ROWS), PITCH(ROWS), d, lane);
  __syncthreads();
  for (int i = (int)threadIdx.x; i < ROWS * own.tokens; i += THREADS) {
    float* const place = sums + i / ROWS * PITCH(ROWS) + i % ROWS;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += place[w * TOKENS * PITCH(ROWS)];
    *place = sum;
  }
#if CLUSTER == 1
  __syncthreads();
#endif
  finish_rows<ROWS>(y + first_token * out, sums, bias, own.row_block * ROWS, out, own.tokens);
}

#else

extern "C" __global__ void CLUSTERED __launch_bounds__(THREADS, BLOCKS)
    nm24_staged(u16* __restrict__ y, const u8* __restrict__ packed, const u16* __restrict__ x,
                const u16* __restrict__ bias, int out, int columns, int steps, int tokens) {
  constexpr int ROWS = WARPS * TILES * 16, STEP_BYTES = WARPS * TILES * RECORD + X_BYTES;
  u8* const memory = shared_memory();
  const int warp = (int)threadIdx.x >> 5, lane = (int)threadIdx.x & 31;
  size_t first_token;
  const Share own = share(steps, tokens, first_token);
  x += first_token * columns;

  const int last = (out + 15) / 16 - 1, first_tile = (own.row_block * WARPS + warp) * TILES;
  const u8* tile[TILES];
#pragma unroll
  for (int r = 0; r < TILES; r++) tile[r] = packed + (size_t)min(first_tile + r, last) * steps * RECORD + lane * 16;
  // The 8 pieces of places of every tile, 4 tiles for one copy of the warp.
  const u8* const rest = packed + (size_t)min(first_tile + lane / 8, last) * steps * RECORD + 1024 + lane % 8 * 16;
  const u32 base = shared_address(memory);
  const u32 own_weights = warp * TILES * RECORD;

  // STEPS steps a stage, stage after stage; each step first the weights of all warps, then x.
  auto begin = [&](int slot, int step) {
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      if (step + s >= own.stop) break;
      const u32 stage = base + (u32)((slot * STEPS + s) * STEP_BYTES);
      const size_t offset = (size_t)(step + s) * RECORD;
#pragma unroll
      for (int r = 0; r < TILES; r++) {
        const u32 to = stage + own_weights + r * RECORD + lane * 16;
        copy_async(to, tile[r] + offset);
        copy_async(to + 512, tile[r] + offset + 512);
      }
      if (lane < TILES * 8) copy_async(stage + own_weights + lane / 8 * RECORD + 1024 + lane % 8 * 16, rest + offset);
      copy_x<THREADS>(stage + WARPS * TILES * RECORD, x, (int)threadIdx.x, own.tokens, columns, step + s);
    }
    commit_copies();
  };

  float d[TILES][GROUPS][4] = {};
  int begun = 0;
  for (; begun < STAGES - 1; begun++) begin(begun, own.first + begun * STEPS);
  int slot = 0;
  for (int step = own.first; step < own.stop; step += STEPS) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all copies of this stage are there, and nobody reads the stage that is filled next
    begin(slot == 0 ? STAGES - 1 : slot - 1, step + (STAGES - 1) * STEPS);
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      if (step + s >= own.stop) break;
      const u32 stage = (u32)((slot * STEPS + s) * STEP_BYTES);
      uint4 a[TILES][2];
      u32 places[TILES];
#pragma unroll
      for (int r = 0; r < TILES; r++) {
        const u8* const record = memory + stage + own_weights + r * RECORD;
        a[r][0] = ((const uint4*)record)[lane];
        a[r][1] = ((const uint4*)record)[32 + lane];
        places[r] = ((const u32*)record)[256 + lane];
      }
#pragma unroll
      for (int n = 0; n < GROUPS; n++) {
        u32 b[2][4];
        load_x(b, base + stage + WARPS * TILES * RECORD, n, lane);
#pragma unroll
        for (int r = 0; r < TILES; r++) multiply_sparse<0>(d[r][n], a[r][0], b[0], places[r]);
#pragma unroll
        for (int r = 0; r < TILES; r++) multiply_sparse<1>(d[r][n], a[r][1], b[1], places[r]);
      }
    }
    slot = slot == STAGES - 1 ? 0 : slot + 1;
  }
  wait_copies<0>();
  __syncthreads();  // the sums take the place of all stages

  float* const sums = (float*)memory;
  store_sums(sums + warp * TILES * 16, PITCH(ROWS), d, lane);
#if CLUSTER == 1
  __syncthreads();
#endif
  finish_rows<ROWS>(y + first_token * out, sums, bias, own.row_block * ROWS, out, own.tokens);
}

#endif
