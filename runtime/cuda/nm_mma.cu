// y = x Wᵀ for 1 to 64 tokens at a time on tensor cores; W keeps the same count in every group of 8, 16 or 32 columns
// (runtime/nm_runs.py has the layout), and its zeros are put back in registers.
//
// The 16 columns of a product may come in any order as long as weights and x agree. Here a lane supplies, product after
// product, a run of 32 columns of its two rows: the count of values it owns is fixed, it reads no other lane's, and two
// products take one 16-byte word of x. Eight columns are an octet, two a pair: a register of the product. A table of
// all 256 masks of an octet says which bytes make each pair (permute); every lane reads its own columns of the table,
// so lookups meet no bank conflict.
//
// Defines: GROUP, COUNT (kept of a group), TILES of 16 rows a warp, WARPS side by side, CHUNK_WARPS that share the
// columns, SPLIT blocks of a cluster that share them further, STAGES of copies in flight, EIGHTS of tokens, BF16,
// ACTIVATION. Grid (row blocks * token tiles, SPLIT), WARPS * CHUNK_WARPS * 32 threads; shared memory as in nm_mma.py.
#include "ptx.cuh"
#include "epilogue.cuh"
#include "nm_octets.cuh"

constexpr int THREADS = WARPS * CHUNK_WARPS * 32;
constexpr int ROWS = WARPS * TILES * 16;                   // of a block
constexpr int TOKENS = EIGHTS * 8;                         // of a block
constexpr int WEIGHT_BYTES = THREADS / 32 * TILES * RECORD;  // of a stage
constexpr int STAGE = WEIGHT_BYTES + CHUNK_WARPS * TOKENS * 256;
constexpr int LINE = ROWS + 4;  // floats a token in the sums: rows of different tokens fall into different banks

struct Block {
  int tile, token, tokens;  // first tile of 16 rows, first token, how many tokens
  int first, last;          // chunks of 128 columns
};

__device__ __forceinline__ Block this_block(int chunks, int tokens, int token_tiles) {
  const int share = (chunks + SPLIT - 1) / SPLIT, token = blockIdx.x % token_tiles * TOKENS;
  const int first = min(chunks, (int)blockIdx.y * share);
  return {(int)blockIdx.x / token_tiles * (WARPS * TILES), token, min(TOKENS, tokens - token), first,
          min(chunks, first + share)};
}

// Start copying the weights of one chunk for this warp: words, then masks, of its TILES tiles.
__device__ __forceinline__ void copy_weights(u32 shared, const u8* words, const u8* masks, int tile, int tiles,
                                             int chunks, int chunk) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < TILES; r++) {
    // Rows that do not exist are computed from the last ones that do, and not stored.
    const size_t record = (size_t)min(tile + r, tiles - 1) * chunks + chunk;
#pragma unroll
    for (int first = 0; first < RECORD / 16; first += 32) {
      const int i = first + lane;
      if (i < WORDS * 16) copy_async(shared + r * RECORD + i * 16, words + record * (WORDS * 256) + i * 16);
      else if (i < RECORD / 16) copy_async(shared + r * RECORD + i * 16, masks + record * 256 + (i - WORDS * 16) * 16);
    }
  }
}

// Start copying x at the 128 CHUNK_WARPS columns from `chunk` on: eight columns at octet o of lanes with c = lane % 4
// lie at place 4 o + c of their token, in the other half of eight places for odd tokens: no bank conflicts.
__device__ __forceinline__ void copy_inputs(u32 shared, const u16* x, const Block& block, int columns, int chunk) {
  for (int i = threadIdx.x; i < block.tokens * CHUNK_WARPS * 16; i += THREADS) {
    const int t = i / (CHUNK_WARPS * 16), j = i % (CHUNK_WARPS * 16), column = chunk * 128 + j * 8;
    const int place = (j % 4 * 4 + j % 16 / 4) ^ (t % 2 * 4), valid = column < columns ? 16 : 0;
    const u16* source = x + (size_t)(block.token + t) * columns + (valid ? column : 0);
    copy_async_kept(shared + ((t * CHUNK_WARPS + j / 16) * 16 + place) * 16, source, valid);
  }
}

// Add one chunk: `weights` and `inputs` lie in shared memory.
__device__ __forceinline__ void add_chunk(float (&sums)[TILES][EIGHTS][4], const u8* table, const u8* weights,
                                          const u8* inputs, int tokens) {
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  Row rows[TILES][2];
#pragma unroll
  for (int r = 0; r < TILES; r++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      rows[r][half].mask = ((const u32*)(weights + r * RECORD + WORDS * 256))[half * 32 + lane];
#pragma unroll
  for (int octet = 0; octet < 4; octet++) {
    u32 a[TILES][2][4];
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 pairs[4];
        expand(pairs, rows[r][half], table, weights + r * RECORD, octet, half);
#pragma unroll
        for (int j = 0; j < 4; j++) a[r][j / 2][j % 2 * 2 + half] = pairs[j];
      }
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
      const int t = min(n * 8 + q, tokens - 1);  // columns of the product that are no token are not stored
      const uint4 b = *(const uint4*)(inputs + (t * CHUNK_WARPS * 16 + ((octet * 4 + c) ^ (t % 2 * 4))) * 16);
#pragma unroll
      for (int r = 0; r < TILES; r++) {
        multiply(sums[r][n], a[r][0], b.x, b.y);
        multiply(sums[r][n], a[r][1], b.z, b.w);
      }
    }
  }
}

// Add the sums of the warps and blocks that shared the columns, always in the same order, and store the outputs.
__device__ __forceinline__ void store(const float (&sums)[TILES][EIGHTS][4], float* room, const u16* bias, u16* y,
                                      const Block& block, int out) {
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4, warp = threadIdx.x / 32;
  float* own = room + warp / WARPS * (TOKENS * LINE) + warp % WARPS * (TILES * 16);
#pragma unroll
  for (int r = 0; r < TILES; r++)
#pragma unroll
    for (int n = 0; n < EIGHTS; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) own[(n * 8 + 2 * c + j % 2) * LINE + r * 16 + q + j / 2 * 8] = sums[r][n][j];
#if SPLIT > 1
  wait_cluster();
#else
  __syncthreads();
#endif
  for (int i = blockIdx.y * THREADS + threadIdx.x; i < block.tokens * ROWS; i += THREADS * SPLIT) {
    const int t = i / ROWS, row = block.tile * 16 + i % ROWS;
    const float* parts = room + t * LINE + i % ROWS;
    float sum = 0.0f;
    for (int k = 0; k < CHUNK_WARPS; k++)
#if SPLIT > 1
      for (u32 rank = 0; rank < SPLIT; rank++) sum += read_cluster(shared_address(parts + k * (TOKENS * LINE)), rank);
#else
      sum += parts[k * (TOKENS * LINE)];
#endif
    if (row < out) y[(size_t)(block.token + t) * out + row] = from_float(finish(sum, bias, row));
  }
#if SPLIT > 1
  wait_cluster();  // no block may end while another reads its shared memory
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, THREADS <= 256 ? 2 : 1)
#if SPLIT > 1
    __cluster_dims__(1, SPLIT, 1)
#endif
    nm_mma(const u8* words, const u8* masks, const u16* x, const u16* bias, u16* y, int tiles, int chunks, int tokens,
           int out, int columns, int token_tiles) {
  const int warp = threadIdx.x / 32, part = warp / WARPS;  // `part`: which of CHUNK_WARPS neighbouring chunks
  const Block block = this_block(chunks, tokens, token_tiles);
  u8* memory = shared_memory();
  u8* stages = memory + TABLE_BYTES;
  const u32 stages_address = shared_address(stages);
  const int tile = block.tile + warp % WARPS * TILES, mine = warp * (TILES * RECORD);
  const int steps = (block.last - block.first + CHUNK_WARPS - 1) / CHUNK_WARPS;

  auto copy = [&](int step) {
    if (step < steps) {
      const u32 stage = stages_address + step % STAGES * STAGE;
      const int chunk = block.first + step * CHUNK_WARPS;
      if (chunk + part < block.last) copy_weights(stage + mine, words, masks, tile, tiles, chunks, chunk + part);
      copy_inputs(stage + WEIGHT_BYTES, x, block, columns, chunk);
    }
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < STAGES - 1; step++) copy(step);
  fill_table(memory, THREADS);  // while the first copies are on their way

  float sums[TILES][EIGHTS][4] = {};
  for (int step = 0; step < steps; step++) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all threads' copies of this step are here, and the stage filled next is used no more
    copy(step + STAGES - 1);
    const u8* stage = stages + step % STAGES * STAGE;
    if (block.first + step * CHUNK_WARPS + part < block.last)
      add_chunk(sums, memory, stage + mine, stage + WEIGHT_BYTES + part * 256, block.tokens);
  }
  wait_copies<0>();
  __syncthreads();  // the sums overwrite the stages
  store(sums, (float*)memory, bias, y, block, out);
}
