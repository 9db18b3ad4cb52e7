// y = x Wᵀ with a 2:4 W by sparse warpgroup products, for many tokens: CLUSTER blocks, one above the other, read x once
// for all. tile_tokens.cu brings x to whole tiles first, so that a tile comes in as one run of bytes: each block asks for
// its share and the copy engine writes it to all of them. A warpgroup of its own (its first warp) keeps the STAGES slots
// filled; the others only wait for a slot, multiply, and give it back to all blocks.
//
// Weights come the same way, or, with DIRECT, from memory to the registers of the warp that multiplies them, two slots
// ahead: shared memory is what limits these products (x is read from it once for every 64 rows), so it is spared.
//
// Where there are few blocks, SPLIT such groups share the columns out, all in one cluster, and add their sums at the end.
//
// Defines: BF16, ACTIVATION, WARPGROUPS (1, 2), TILES, TOKENS (32 to 256), STAGES (>= 3), CLUSTER (1, 2, 4), SPLIT (with
// CLUSTER at most 8), DIRECT.
#include "ptx.cuh"
#include "wgmma.cuh"
#include "epilogue.cuh"
#include "nm24_tiles.cuh"

#define SHARE (X_BYTES / CLUSTER)
#define RECORDS (ROWS / 16)
// Clusters whose token tiles run together, so that weights and x are both read again from L2.
#define GROUP (16 / CLUSTER)

#if CLUSTER * SPLIT > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, SPLIT, 1)
#else
#define IN_CLUSTERS
#endif

struct Ring {
  u32 slots, full, empty;  // shared addresses: STAGES slots, a barrier of each kind for each
};

struct Task {
  int row, token_tile;     // the block's first row, and its tile of tokens
  int rank, part;          // which of the blocks that share x, and which part of the columns
  int first, count;        // that part, in chunks of 64
};

__device__ __forceinline__ Task find_task(int out, int tokens, int chunks) {
  const int token_tiles = (tokens + TOKENS - 1) / TOKENS, clusters = (out + ROWS * CLUSTER - 1) / (ROWS * CLUSTER);
  const int id = (int)blockIdx.x / CLUSTER, group = id / (GROUP * token_tiles), place = id % (GROUP * token_tiles);
  const int height = min(GROUP, clusters - group * GROUP);
  Task task;
  task.rank = (int)blockIdx.x % CLUSTER, task.part = (int)blockIdx.y;
  task.row = ((group * GROUP + place % height) * CLUSTER + task.rank) * ROWS, task.token_tile = place / height;
  task.first = (int)((long long)chunks * task.part / SPLIT);
  task.count = (int)((long long)chunks * (task.part + 1) / SPLIT) - task.first;
  return task;
}

// Fill every slot as soon as all blocks that share x have given it back.
__device__ __forceinline__ void fill_slots(const Ring& ring, const u8* packed, const u8* tiles, const Task& task,
                                           int chunks, int out) {
  const int lane = (int)threadIdx.x % 32, last = (out + 15) / 16 - 1;
  int slot = 0, round = 0;
  for (int k = 0; k < task.count; k++) {
    const u32 to = ring.slots + slot * SLOT, full = ring.full + slot * 8;
    if (round > 0) wait_barrier(ring.empty + slot * 8, round - 1);
    if (lane == 0) expect_bytes(full, X_BYTES + WEIGHT_BYTES);
    __syncwarp();
    if (!DIRECT && lane < RECORDS) {
      const long long record = (long long)min(task.row / 16 + lane, last) * chunks + task.first + k;
      copy_run(to + X_BYTES + lane * RECORD, packed + record * RECORD, RECORD, full);
    }
    if (lane == 0) {
      const u8* from = tiles + ((long long)task.token_tile * chunks + task.first + k) * X_BYTES + task.rank * SHARE;
#if CLUSTER > 1
      copy_run_to_all(to + task.rank * SHARE, from, SHARE, full, ((1u << CLUSTER) - 1) << (task.part * CLUSTER));
#else
      copy_run(to, from, SHARE, full);
#endif
    }
    slot = slot + 1 == STAGES ? 0 : slot + 1;
    round += slot == 0;
  }
}

// Tell every block that shares x that this warp has read the slot for the last time.
__device__ __forceinline__ void give_back(u32 empty, int part) {
  __syncwarp();
  if ((int)threadIdx.x % 32 < CLUSTER) arrive_at(empty, threadIdx.x % 32 + part * CLUSTER);
}

#if DIRECT
// Read this warp's 16 rows of each 64, of the task's chunk k, from the packed weights; past the last chunk nothing.
__device__ __forceinline__ void load_direct(Fragment (&a)[TILES], const u8* packed, const Task& task, int k, int chunks,
                                            int out) {
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, last = (out + 15) / 16 - 1;
  if (k >= task.count) return;
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int record = min(task.row / 16 + (warp / 4 * TILES + i) * 4 + warp % 4, last);
    const u8* from = packed + ((long long)record * chunks + task.first + k) * RECORD;
    a[i].first = __ldcg((const uint4*)from + lane);
    a[i].second = __ldcg((const uint4*)from + 32 + lane);
    a[i].places = __ldcg((const u32*)(from + 1024) + lane);
  }
}
#endif

// `weights`: where they lie in the first slot, or the packed ones.
__device__ __forceinline__ void multiply_slots(float (&d)[TILES][TOKENS / 2], const Ring& ring, const u8* weights,
                                               const Task& task, int chunks, int out) {
  int slot = 0, before = STAGES - 1, round = 0, k = 0;
  auto step = [&](Fragment(&a)[TILES], Fragment(&later)[TILES]) {
    wait_barrier(ring.full + slot * 8, round);
#if !DIRECT
    load(a, weights + slot * SLOT);
#endif
    multiply_slot(d, a, ring.slots + slot * SLOT);
    wait_products<1>();
    if (k > 0) give_back(ring.empty + before * 8, task.part);
#if DIRECT
    load_direct(later, weights, task, k + 2, chunks, out);
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
  load_direct(one, weights, task, 0, chunks, out);
  load_direct(two, weights, task, 1, chunks, out);
  while (k + 2 < task.count) {
    step(one, three);
    step(two, one);
    step(three, two);
  }
  if (k < task.count) step(one, three);
  if (k < task.count) step(two, one);
#else
  while (k + 1 < task.count) {
    step(one, one);
    step(two, two);
  }
  if (k < task.count) step(one, one);
#endif
  wait_products<0>();
#pragma unroll
  for (int i = 0; i < TILES; i++) take_sums(d[i]);
}

// packed [ceil(out / 16)][chunks][1152], tiles as tile_tokens.cu writes them, bias (out,) or null, y (tokens, out).
// Blocks: CLUSTER * clusters of CLUSTER * ROWS rows * token tiles, by SPLIT.
extern "C" __global__ IN_CLUSTERS void __launch_bounds__(128 * WARPGROUPS + 128, 1)
    nm24_wgmma_many(const u8* packed, const u8* tiles, const u16* bias, u16* y, int out, int tokens, int chunks) {
  const Task task = find_task(out, tokens, chunks);

  // The barriers lie before what the sums will overwrite: other blocks may still arrive then.
  u8* shared = shared_memory() + 1024;
  Ring ring;
  ring.slots = shared_address(shared), ring.full = ring.slots - 1024, ring.empty = ring.full + 8 * STAGES;
  if (threadIdx.x == 0)
    for (int slot = 0; slot < STAGES; slot++) {
      start_barrier(ring.full + slot * 8, 1);
      start_barrier(ring.empty + slot * 8, 4 * WARPGROUPS * CLUSTER);
    }
#if CLUSTER * SPLIT > 1
  wait_cluster();
#else
  __syncthreads();
#endif
  if (threadIdx.x >= 128 * WARPGROUPS) {
#if WARPGROUPS == 2
    give_registers<40>();
#endif
    if (threadIdx.x < 128 * WARPGROUPS + 32) fill_slots(ring, packed, tiles, task, chunks, out);
    __syncthreads();
#if SPLIT == 1
    __syncthreads();
#else
    wait_cluster();
#endif
  } else {
#if WARPGROUPS == 2
    take_registers<232>();  // 2 * 128 * 232 + 128 * 40 registers of 65536
#endif
    float d[TILES][TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < TOKENS / 2; j++) d[i][j] = 0.0f;
    multiply_slots(d, ring, DIRECT ? packed : shared + X_BYTES, task, chunks, out);
    __syncthreads();  // every warpgroup has read its last slot
    keep_sums((float*)shared, d);
#if SPLIT == 1
    __syncthreads();
    store_sums((const float*)shared, bias, y, task.row, task.token_tile * TOKENS, out, tokens);
#else
    wait_cluster();
    store_split((const float*)shared, bias, y, task.row, task.token_tile * TOKENS, task.part, task.rank, CLUSTER, out,
                tokens);
#endif
  }
#if CLUSTER * SPLIT > 1
  wait_cluster();  // no block ends while another arrives at its barriers or reads its sums
#endif
}
