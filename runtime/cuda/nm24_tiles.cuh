// What the 2:4 kernels on sparse warpgroup products share: a block of WARPGROUPS * TILES * 64 rows x TOKENS tokens.
// Included after ptx.cuh, wgmma.cuh and epilogue.cuh. Threads past 128 * WARPGROUPS take no part.
#pragma once

#define ROWS (64 * WARPGROUPS * TILES)
// Bytes of 16 rows x 64 columns of weights in the order of runtime/nm/fragments.py, and of 64 columns of x.
#define RECORD 1152
#define X_BYTES (TOKENS * 128)
// A slot holds 64 columns of x, then of the weights: x starts at a multiple of 1024 in every slot.
#ifndef DIRECT
#define DIRECT 0  // 1: weights go from memory to registers
#endif
#define WEIGHT_BYTES (DIRECT ? 0 : ROWS / 16 * RECORD)
#define SLOT ((X_BYTES + WEIGHT_BYTES + 1023) / 1024 * 1024)
// Sums of a token lie ROWS + 4 floats apart: lanes of four tokens and eight rows then write to 32 banks.
#define PITCH (ROWS + 4)

struct Fragment {
  uint4 first, second;  // stored values of columns 0-31 and 32-63
  u32 places;
};

// Read this warp's 16 rows of each 64 from `weights`, a slot's.
__device__ __forceinline__ void load(Fragment (&a)[TILES], const u8* weights) {
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const u8* record = weights + ((warp / 4 * TILES + i) * 4 + warp % 4) * RECORD;
    a[i].first = ((const uint4*)record)[lane];
    a[i].second = ((const uint4*)record)[32 + lane];
    a[i].places = ((const u32*)(record + 1024))[lane];
  }
}

// Begin the products of one slot and close them as a batch.
__device__ __forceinline__ void multiply_slot(float (&d)[TILES][TOKENS / 2], const Fragment (&a)[TILES], u32 x) {
  begin_products();
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    SparseProduct<0, TOKENS>::begin(d[i], a[i].first, a[i].places, describe(x));
    SparseProduct<1, TOKENS>::begin(d[i], a[i].second, a[i].places, describe(x + 64));
  }
  commit_products();
}

// Put d to shared memory, PITCH floats a token.
__device__ __forceinline__ void keep_sums(float* sums, const float (&d)[TILES][TOKENS / 2]) {
  const int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < TILES; i++) {
    const int row = (warp / 4 * TILES + i) * 64 + warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int j = 0; j < TOKENS / 2; j++)
      sums[(j / 4 * 8 + lane % 4 * 2 + j % 2) * PITCH + row + j / 2 % 2 * 8] = d[i][j];
  }
}

// Finish the sums of the block whose first row and token are given, and store them, by 16 bytes where the address of a
// row allows it.
__device__ __forceinline__ void store_sums(const float* sums, const u16* bias, u16* y, int first_row, int first_token,
                                           int out, int tokens) {
  const int rows = min(ROWS, out - first_row), count = min(TOKENS, tokens - first_token);
  if (out % 8 != 0) {
    for (int token = 0; token < count; token++)
      for (int row = (int)threadIdx.x; row < rows; row += 128 * WARPGROUPS)
        y[(long long)(first_token + token) * out + first_row + row] =
            from_float(finish(sums[token * PITCH + row], bias, first_row + row));
    return;
  }
  // A thread keeps its 8 rows, and so their bias, for all its tokens.
  const int row = (int)threadIdx.x % (ROWS / 8) * 8;
  if (row >= rows) return;
  float added[8];
#pragma unroll
  for (int j = 0; j < 8; j++) added[j] = bias == nullptr ? 0.0f : to_float(bias[first_row + row + j]);
  for (int token = (int)threadIdx.x / (ROWS / 8); token < count; token += 128 * WARPGROUPS / (ROWS / 8)) {
    const float4 low = *(const float4*)(sums + token * PITCH + row);
    const float4 high = *(const float4*)(sums + token * PITCH + row + 4);
    const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    u32 pairs[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
      pairs[j] = from_float(finish(values[2 * j] + added[2 * j], nullptr, 0));
      pairs[j] |= (u32)from_float(finish(values[2 * j + 1] + added[2 * j + 1], nullptr, 0)) << 16;
    }
    *(uint4*)(y + (long long)(first_token + token) * out + first_row + row) =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

#if SPLIT > 1
// The same where SPLIT blocks of the cluster, from rank `first_rank` on and `step` apart, have a part of each sum: they
// are added in that order, and block `part` of them stores every SPLIT-th token.
__device__ __forceinline__ void store_split(const float* sums, const u16* bias, u16* y, int first_row, int first_token,
                                            int part, int first_rank, int step, int out, int tokens) {
  const int rows = min(ROWS, out - first_row), count = min(TOKENS, tokens - first_token);
  const u32 base = shared_address(sums);
  for (int token = part; token < count; token += SPLIT)
    for (int row = (int)threadIdx.x; row < rows; row += 128 * WARPGROUPS) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < SPLIT; i++) sum += read_cluster(base + (token * PITCH + row) * 4, first_rank + i * step);
      y[(long long)(first_token + token) * out + first_row + row] = from_float(finish(sum, bias, first_row + row));
    }
}
#endif
