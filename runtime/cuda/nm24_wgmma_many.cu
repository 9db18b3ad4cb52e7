// y = x Wᵀ with a 2:4 W by sparse warpgroup products, for many tokens: a cluster of CLUSTER blocks, one above the other,
// reads x once for all. tile_tokens.cu brings x to whole tiles first, so that a tile comes in as one run of bytes: each
// block asks for its share and the copy engine writes it to every block of the cluster. A warpgroup of its own (its first
// warp) keeps the STAGES slots filled; the others only wait for a slot, multiply, and give it back to all blocks.
//
// Weights come the same way, or, with DIRECT, from memory to the registers of the warp that multiplies them, two slots
// ahead: shared memory is what limits these products (x is read from it once for every 64 rows), so it is spared.
//
// Defines: BF16, ACTIVATION, WARPGROUPS (1, 2), TILES, TOKENS (32 to 256), STAGES (>= 3), CLUSTER (1, 2, 4), DIRECT.
#include "ptx.cuh"
#include "wgmma.cuh"
#include "epilogue.cuh"
#include "nm24_tiles.cuh"

#define SHARE (X_BYTES / CLUSTER)
#define RECORDS (ROWS / 16)
// Clusters whose token tiles run together, so that weights and x are both read again from L2.
#define GROUP (16 / CLUSTER)

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

struct Ring {
  u32 slots, full, empty;  // shared addresses: STAGES slots, a barrier of each kind for each
};

// Fill every slot as soon as all blocks have given it back.
__device__ __forceinline__ void fill_slots(const Ring& ring, const u8* packed, const u8* tiles, int first_row,
                                           int token_tile, int rank, int chunks, int out) {
  const int lane = (int)threadIdx.x % 32, last = (out + 15) / 16 - 1;
  int slot = 0, round = 0;
  for (int k = 0; k < chunks; k++) {
    const u32 to = ring.slots + slot * SLOT, full = ring.full + slot * 8;
    if (round > 0) wait_barrier(ring.empty + slot * 8, round - 1);
    if (lane == 0) expect_bytes(full, X_BYTES + WEIGHT_BYTES);
    __syncwarp();
    if (!DIRECT && lane < RECORDS) {
      const long long record = (long long)min(first_row / 16 + lane, last) * chunks + k;
      copy_run(to + X_BYTES + lane * RECORD, packed + record * RECORD, RECORD, full);
    }
    if (lane == 0) {
      const u8* from = tiles + ((long long)token_tile * chunks + k) * X_BYTES + rank * SHARE;
#if CLUSTER > 1
      copy_run_to_all(to + rank * SHARE, from, SHARE, full, (1u << CLUSTER) - 1);
#else
      copy_run(to, from, SHARE, full);
#endif
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    round += slot == 0;
  }
}

// Tell every block of the cluster that this warp has read the slot for the last time.
__device__ __forceinline__ void give_back(u32 empty) {
  __syncwarp();
  if ((int)threadIdx.x % 32 < CLUSTER) arrive_at(empty, threadIdx.x % 32);
}

#if DIRECT
// Read this warp's 16 rows of each 64, of one chunk, from the packed weights; past the last chunk nothing.
__device__ __forceinline__ void load_direct(Fragment (&a)[TILES], const u8* packed, int first_row, int chunk, int chunks,
                                            int out) {
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, last = (out + 15) / 16 - 1;
  if (chunk >= chunks) return;
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int record = min(first_row / 16 + (warp / 4 * TILES + i) * 4 + warp % 4, last);
    const u8* from = packed + ((long long)record * chunks + chunk) * RECORD;
    a[i].first = __ldcg((const uint4*)from + lane);
    a[i].second = __ldcg((const uint4*)from + 32 + lane);
    a[i].places = __ldcg((const u32*)(from + 1024) + lane);
  }
}
#endif

// `weights`: where they lie in the first slot, or the packed ones.
__device__ __forceinline__ void multiply_slots(float (&d)[TILES][TOKENS / 2], const Ring& ring, const u8* weights,
                                               int first_row, int chunks, int out) {
  int slot = 0, before = STAGES - 1, round = 0, k = 0;
  auto step = [&](Fragment(&a)[TILES], Fragment(&later)[TILES]) {
    wait_barrier(ring.full + slot * 8, round);
#if !DIRECT
    load(a, weights + slot * SLOT);
#endif
    multiply_slot(d, a, ring.slots + slot * SLOT);
    wait_products<1>();
    if (k > 0) give_back(ring.empty + before * 8);
#if DIRECT
    load_direct(later, weights, first_row, k + 2, chunks, out);
#endif
    before = slot;
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    round += slot == 0;
    k++;
  };
  // Sets of fragments in turn: the products of the chunk before still read theirs.
  Fragment one[TILES], two[TILES];
#if DIRECT
  Fragment three[TILES];
  load_direct(one, weights, first_row, 0, chunks, out);
  load_direct(two, weights, first_row, 1, chunks, out);
  while (k + 2 < chunks) {
    step(one, three);
    step(two, one);
    step(three, two);
  }
  if (k < chunks) step(one, three);
  if (k < chunks) step(two, one);
#else
  while (k + 1 < chunks) {
    step(one, one);
    step(two, two);
  }
  if (k < chunks) step(one, one);
#endif
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < TILES; i++) take_sums(d[i]);
}

// packed [ceil(out / 16)][chunks][1152], tiles as tile_tokens.cu writes them, bias (out,) or null, y (tokens, out).
// Blocks: CLUSTER * clusters of CLUSTER * ROWS rows * token tiles.
extern "C" __global__ IN_CLUSTERS void __launch_bounds__(128 * WARPGROUPS + 128, 1)
    nm24_wgmma_many(const u8* packed, const u8* tiles, const u16* bias, u16* y, int out, int tokens, int chunks) {
  const int columns_of_blocks = (tokens + TOKENS - 1) / TOKENS, clusters = (out + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
  const int id = (int)blockIdx.x / CLUSTER, rank = (int)blockIdx.x % CLUSTER;
  const int group = id / (GROUP * columns_of_blocks), place = id % (GROUP * columns_of_blocks);
  const int height = min(GROUP, clusters - group * GROUP);
  const int first_row = ((group * GROUP + place % height) * CLUSTER + rank) * ROWS, token_tile = place / height;

  // The barriers lie before what the sums will overwrite: other blocks may still arrive then.
  u8* shared = shared_memory() + 1024;
  Ring ring;
  ring.slots = shared_address(shared), ring.full = ring.slots - 1024, ring.empty = ring.full + 8 * STAGES;
  if (threadIdx.x == 0)
    for (int slot = 0; slot < STAGES; slot++) {
      start_barrier(ring.full + slot * 8, 1);
      start_barrier(ring.empty + slot * 8, 4 * WARPGROUPS * CLUSTER);
    }
#if CLUSTER > 1
  wait_cluster();
#else
  __syncthreads();
#endif
  if (threadIdx.x >= 128 * WARPGROUPS) {
#if WARPGROUPS == 2
    give_registers<40>();
#endif
    if (threadIdx.x < 128 * WARPGROUPS + 32)
      fill_slots(ring, packed, tiles, first_row, token_tile, rank, chunks, out);
    __syncthreads();
    __syncthreads();
  } else {
#if WARPGROUPS == 2
    take_registers<232>();  // 2 * 128 * 232 + 128 * 40 registers of 65536
#endif
    float d[TILES][TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < TOKENS / 2; j++) d[i][j] = 0.0f;
    multiply_slots(d, ring, DIRECT ? packed : shared + X_BYTES, first_row, chunks, out);
    __syncthreads();  // every warpgroup has read its last slot
    keep_sums((float*)shared, d);
    __syncthreads();
    store_sums((const float*)shared, bias, y, first_row, token_tile * TOKENS, out, tokens);
  }
#if CLUSTER > 1
  wait_cluster();  // no block ends while another arrives at its barriers
#endif
}
