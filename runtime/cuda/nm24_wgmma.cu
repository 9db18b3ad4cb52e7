// y = x Wᵀ with a 2:4 W by sparse warpgroup products: for 8 to a few hundred tokens, where mma.sync is too slow.
//
// A cluster of SPLIT blocks computes WARPGROUPS * TILES * 64 rows x TOKENS tokens, each block a share of the columns.
// Weights (runtime/nm/fragments.py: 1152 bytes per 16 rows x 64 columns) and x go through a ring of STAGES slots of 64
// columns, filled STAGES - 2 ahead: a slot is filled again once the products of the chunk before the last are done,
// which every warpgroup has waited for before the barrier, so products of one chunk always run behind the next.
//
// Defines: BF16, ACTIVATION, WARPGROUPS (1, 2), TILES, TOKENS (8 to 256), STAGES (>= 3), SPLIT (1 to 8).
#include "ptx.cuh"
#include "wgmma.cuh"
#include "epilogue.cuh"
#include "nm24_tiles.cuh"

#define THREADS (128 * WARPGROUPS)
// Row blocks whose token tiles run together, so that weights and x are both read again from L2.
#define GROUP 16

#if SPLIT > 1
#define IN_CLUSTERS __cluster_dims__(SPLIT, 1, 1)
#else
#define IN_CLUSTERS
#endif

struct Tile {
  int row, token, rank;  // first row, first token, this block's share of the columns
};

__device__ __forceinline__ Tile find_tile(int out, int tokens) {
  const int row_blocks = (out + ROWS - 1) / ROWS, token_tiles = (tokens + TOKENS - 1) / TOKENS;
  const int id = (int)blockIdx.x / SPLIT, group = id / (GROUP * token_tiles), place = id % (GROUP * token_tiles);
  const int height = min(GROUP, row_blocks - group * GROUP);
  Tile tile;
  tile.row = (group * GROUP + place % height) * ROWS;
  tile.token = place / height * TOKENS;
  tile.rank = (int)blockIdx.x % SPLIT;
  return tile;
}

// Start the copies of chunk `chunk` (64 columns) to the slot at `slot`. Rows past the last are any others' (never
// stored), tokens and columns past the last are 0.
__device__ __forceinline__ void fill(u32 slot, const u8* packed, const u8* x, const Tile& tile, int chunk, int chunks,
                                     int out, int columns, int tokens) {
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
  const int last = (out + 15) / 16 - 1;
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int record = (warp / 4 * TILES + i) * 4 + warp % 4;
    const u8* from = packed + ((long long)min(tile.row / 16 + record, last) * chunks + chunk) * RECORD + lane * 16;
    const u32 to = slot + X_BYTES + record * RECORD + lane * 16;
    copy_async(to, from);
    copy_async(to + 512, from + 512);
    if (lane < 8) copy_async(to + 1024, from + 1024);
  }
#pragma unroll
  for (int start = 0; start < TOKENS * 8; start += THREADS) {
    const int piece = start + (int)threadIdx.x, token = piece / 8, h = piece % 8;
    if (TOKENS * 8 % THREADS != 0 && piece >= TOKENS * 8) break;
    const int row = tile.token + token, column = chunk * 64 + h * 8;
    const bool inside = row < tokens && column < columns;
    const long long place = inside ? (long long)row * columns + column : 0;
    copy_async_kept(slot + token * 128 + ((h ^ (token & 7)) << 4), x + 2 * place, inside ? 16 : 0);
  }
}

// packed [ceil(out / 16)][chunks][1152], x (tokens, columns) of 16 bits, columns a multiple of 8, chunks of 64 columns;
// bias (out,) or null; y (tokens, out). Blocks: SPLIT * row blocks * token tiles.
extern "C" __global__ IN_CLUSTERS void __launch_bounds__(THREADS, 1)
    nm24_wgmma(const u8* packed, const u8* x, const u16* bias, u16* y, int out, int columns, int tokens, int chunks) {
  u8* shared = shared_memory();
  const u32 base = shared_address(shared);
  const Tile tile = find_tile(out, tokens);
  const int first = (int)((long long)chunks * tile.rank / SPLIT);
  const int count = (int)((long long)chunks * (tile.rank + 1) / SPLIT) - first;
  float d[TILES][TOKENS / 2];
#pragma unroll
  for (int i = 0; i < TILES; i++)
#pragma unroll
    for (int j = 0; j < TOKENS / 2; j++) d[i][j] = 0.0f;

#pragma unroll
  for (int k = 0; k < STAGES - 2; k++) {
    if (k < count) fill(base + k * SLOT, packed, x, tile, first + k, chunks, out, columns, tokens);
    commit_copies();
  }
  int slot = 0, next = STAGES - 2, k = 0;
  // Two sets of fragments in turn: the products of the chunk before still read theirs.
  Fragment even[TILES], odd[TILES];
  auto step = [&](Fragment(&a)[TILES]) {
    wait_copies_for_products<STAGES - 3>();
    __syncthreads();
    load(a, shared + slot * SLOT + X_BYTES);
    if (k + STAGES - 2 < count)
      fill(base + next * SLOT, packed, x, tile, first + k + STAGES - 2, chunks, out, columns, tokens);
    commit_copies();
    multiply_slot(d, a, base + slot * SLOT);
    wait_products<1>();
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
    k++;
  };
  while (k + 1 < count) {
    step(even);
    step(odd);
  }
  if (k < count) step(even);
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < TILES; i++) take_sums(d[i]);
  __syncthreads();  // every warpgroup has read its last chunk
  keep_sums((float*)shared, d);
#if SPLIT > 1
  wait_cluster();
  store_split((const float*)shared, bias, y, tile.row, tile.token, tile.rank, 0, 1, out, tokens);
  wait_cluster();  // no block ends while another reads its sums
#else
  __syncthreads();
  store_sums((const float*)shared, bias, y, tile.row, tile.token, out, tokens);
#endif
}
