// From the sums that every lane holds for its row to the outputs: added over the WARPS warps of a block, then over the
// SPLIT blocks of a cluster, always in the same order, so that equal inputs give equal bits. Needs ptx.cuh, epilogue.cuh.
#pragma once

// Store outputs `token` .. `token` + TOKENS - 1 (those below `tokens`) of the 32 rows of `tile`. A lane's row is
// rows[32 tile + lane], less than 0 where it has none; without `rows` it is 32 tile + lane, none from `out` on.
// `room` is shared memory, WARPS * TOKENS * 32 floats, that no thread uses any more.
__device__ __forceinline__ void store_rows(const float (&sums)[TOKENS], float* room, const int* rows, const u16* bias,
                                           u16* y, int tile, int token, int tokens, int out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int threads = WARPS * 32, outputs = TOKENS * 32;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) room[(warp * TOKENS + t) * 32 + lane] = sums[t];
  __syncthreads();
#pragma unroll
  for (int first = 0; first < outputs; first += threads) {
    const int i = first + threadIdx.x;
    if (i >= outputs) break;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += room[w * outputs + i];
    room[i] = sum;  // read by this thread alone until the cluster has met
  }
#if SPLIT > 1
  wait_cluster();
#endif
#pragma unroll
  for (int first = 0; first < outputs; first += threads) {
    const int i = first + threadIdx.x;
    if (i >= outputs || blockIdx.x % SPLIT != 0) break;
    float sum = room[i];
#if SPLIT > 1
    for (u32 block = 1; block < SPLIT; block++) sum += read_cluster(shared_address(room + i), block);
#endif
    const int t = token + i / 32, place = tile * 32 + i % 32;
    const int row = rows == nullptr ? (place < out ? place : -1) : rows[place];
    if (row >= 0 && t < tokens) y[(size_t)t * out + row] = from_float(finish(sum, bias, row));
  }
#if SPLIT > 1
  wait_cluster();  // no block may end while another reads its shared memory
#endif
}
