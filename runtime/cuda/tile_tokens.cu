// Bring x to whole tiles of TOKENS tokens x 64 columns, each one run of bytes as sparse products read it (`describe` of
// wgmma.cuh), so that one request moves a tile to shared memory, and to all blocks of a cluster at once.
//
// Defines: BF16, TOKENS (32, 64, 128 or 256).
#include "ptx.cuh"

#define BLOCKS_PER_TILE (TOKENS / 32)

// x (tokens, columns) of 16 bits, columns a multiple of 8; tiles [token tile][chunk of 64 columns][token of the tile]
// [128 bytes], 0 past the last token and column. A thread moves 16 bytes; BLOCKS_PER_TILE blocks for each tile.
extern "C" __global__ void __launch_bounds__(256)
    tile_tokens(const u8* x, u8* tiles, int columns, int tokens, int chunks) {
  const int tile = (int)blockIdx.x / BLOCKS_PER_TILE;
  const int piece = (int)blockIdx.x % BLOCKS_PER_TILE * 256 + (int)threadIdx.x, within = piece / 8, h = piece % 8;
  const int token = tile / chunks * TOKENS + within, column = tile % chunks * 64 + h * 8;
  uint4 values = make_uint4(0, 0, 0, 0);
  if (token < tokens && column < columns)
    values = *(const uint4*)(x + 2 * ((long long)token * columns + column));
  *(uint4*)(tiles + (long long)tile * (TOKENS * 128) + within * 128 + ((h ^ (within & 7)) << 4)) = values;
}
