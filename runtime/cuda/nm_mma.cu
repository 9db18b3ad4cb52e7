// y = x Wᵀ for 1 to 64 tokens at a time on tensor cores; W keeps the same count in every group of 8, 16 or 32 columns
// (runtime/nm/nm_runs.py has the layout), and its zeros are put back in registers.
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
#include "offsets.cuh"
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

// Where this thread copies from, and to in a stage. Weights: words, then masks, of the warp's TILES tiles. x: eight
// columns at octet o of lanes with c = lane % 4 lie at place 4 o + c of their token, in the other half of eight places
// for odd tokens, so that lanes that read together meet no bank conflict.
struct Copies {
  const u8* words[TILES];
  const u8* masks[TILES];
  const u16* x;
  int column, token;          // of x
  u32 weights_to, x_to;       // bytes from the start of a stage
};

__device__ __forceinline__ Copies first_copies(const u8* words, const u8* masks, const u16* x, const Block& block,
                                               int tiles, int chunks, int columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, j = threadIdx.x % (CHUNK_WARPS * 16);
  Copies copies;
#pragma unroll
  for (int r = 0; r < TILES; r++) {
    // Rows that do not exist are computed from the last ones that do, and not stored.
    const int tile = min(block.tile + warp % WARPS * TILES + r, tiles - 1);
    const size_t record = (size_t)tile * chunks + block.first + warp / WARPS;
    copies.words[r] = words + record * (WORDS * 256) + lane * 16;
    copies.masks[r] = masks + record * 256 + lane % 16 * 16;
  }
  copies.column = block.first * 128 + j * 8;
  copies.token = threadIdx.x / (CHUNK_WARPS * 16);
  copies.x = x + (size_t)(block.token + copies.token) * columns + copies.column;
  copies.weights_to = warp * (TILES * RECORD) + lane * 16;
  const int place = (j % 4 * 4 + j % 16 / 4) ^ (copies.token % 2 * 4);
  copies.x_to = WEIGHT_BYTES + ((copies.token * CHUNK_WARPS + j / 16) * 16 + place) * 16;
  return copies;
}

// Start the copies of one step into `stage`, and move on to the next. `live`: the warp has a chunk in this step.
__device__ __forceinline__ void copy(Copies& copies, u32 stage, const u16* x, bool live, int tokens, int columns) {
  const int lane = threadIdx.x % 32;
  if (live) {
#pragma unroll
    for (int r = 0; r < TILES; r++) {
      const u32 to = stage + copies.weights_to + r * RECORD;
#pragma unroll
      for (int i = 0; i < WORDS / 2; i++) copy_async(to + i * 512, copies.words[r] + i * 512);
      if (WORDS % 2 && lane < 16) copy_async(to + WORDS / 2 * 512, copies.words[r] + WORDS / 2 * 512);
      if (lane < 16) copy_async(to + WORDS * 256, copies.masks[r]);
      copies.words[r] += CHUNK_WARPS * WORDS * 256;
      copies.masks[r] += CHUNK_WARPS * 256;
    }
  }
  const int valid = copies.column < columns ? 16 : 0;
#pragma unroll
  for (int t = 0; t < TOKENS; t += 2 * WARPS)
    if (copies.token + t < tokens)
      copy_async_kept(stage + copies.x_to + t * (CHUNK_WARPS * 256), valid ? copies.x + (size_t)t * columns : x, valid);
  copies.x += CHUNK_WARPS * 128;
  copies.column += CHUNK_WARPS * 128;
}

// Add one chunk: `weights` and `inputs` are the addresses of this warp's share of a stage.
__device__ __forceinline__ void add_chunk(float (&sums)[TILES][EIGHTS][4], u32 table, u32 weights, u32 inputs,
                                          int tokens) {
  const int lane = threadIdx.x % 32, c = lane % 4;
  // Columns of the product that are no token are not stored. For few tokens they read the last one's x, together.
  const int token = EIGHTS == 1 ? min(lane / 4, tokens - 1) : lane / 4, odd = token % 2;
  const u32 line = inputs + token * (CHUNK_WARPS * 256) + c * 16;
  const u32 places[2] = {line + odd * 64, line - odd * 64};  // of even octets and, with 64 an octet, of odd ones
  Row rows[TILES][2];
#pragma unroll
  for (int r = 0; r < TILES; r++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      rows[r][half].mask = read_word(weights + r * RECORD + (WORDS * 2 + half) * 128 + lane * 4);
#pragma unroll
  for (int octet = 0; octet < 4; octet++) {
    u32 a[TILES][2][4];
#pragma unroll
    for (int r = 0; r < TILES; r++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        u32 pairs[4];
        expand(pairs, rows[r][half], {table, words_column(weights + r * RECORD)}, octet, half);
#pragma unroll
        for (int j = 0; j < 4; j++) a[r][j / 2][j % 2 * 2 + half] = pairs[j];
      }
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
      u32 b[4];
      load_shared(b, places[octet % 2] + octet * 64 + n * (CHUNK_WARPS * 2048));
#pragma unroll
      for (int r = 0; r < TILES; r++) {
        multiply(sums[r][n], a[r][0], b[0], b[1]);
        multiply(sums[r][n], a[r][1], b[2], b[3]);
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

extern "C" __global__ void __launch_bounds__(THREADS, THREADS <= 256 && TILES * EIGHTS <= 4 ? 2 : 1)
#if SPLIT > 1
    __cluster_dims__(1, SPLIT, 1)
#endif
    nm_mma(const u8* words, const u8* masks, const u16* x, const u16* bias, u16* y, int tiles, int chunks, int tokens,
           int out, int columns, int token_tiles) {
  const int warp = threadIdx.x / 32, part = warp / WARPS;  // `part`: which of CHUNK_WARPS neighbouring chunks
  const Block block = this_block(chunks, tokens, token_tiles);
  u8* memory = shared_memory();
  const u32 table = table_column(shared_address(memory)), stages = shared_address(memory + TABLE_BYTES);
  const int steps = (block.last - block.first + CHUNK_WARPS - 1) / CHUNK_WARPS;

  Copies copies = first_copies(words, masks, x, block, tiles, chunks, columns);
  int chunk = block.first + part;  // that this warp copies next
  auto copy_next = [&](u32 stage, bool more) {
    if (more) copy(copies, stage, x, chunk < block.last, block.tokens, columns);
    chunk += CHUNK_WARPS;
    commit_copies();
  };
#pragma unroll
  for (int step = 0; step < STAGES - 1; step++) copy_next(stages + step * STAGE, step < steps);
  fill_table(memory, THREADS);  // while the first copies are on their way

  float sums[TILES][EIGHTS][4] = {};
  u32 filled = stages, free = stages + (STAGES - 1) * STAGE;
  for (int step = 0; step < steps; step++) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all threads' copies of this step are here, and the stage filled next is used no more
    copy_next(free, step + STAGES - 1 < steps);
    if (block.first + step * CHUNK_WARPS + part < block.last)
      add_chunk(sums, table, filled + warp * (TILES * RECORD), filled + WEIGHT_BYTES + part * 256, block.tokens);
    free = filled;
    filled = filled == stages + (STAGES - 1) * STAGE ? stages : filled + STAGE;
  }
  wait_copies<0>();
  __syncthreads();  // the sums overwrite the stages
  store(sums, (float*)memory, bias, y, block, out);
}
