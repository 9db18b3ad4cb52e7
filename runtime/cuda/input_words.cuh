// Four neighbouring columns of x for TOKENS tokens, as lanes read and keep them. Needs ptx.cuh.
#pragma once

// Columns `column` .. + 3 of rows `token` .. + TOKENS - 1 of x (tokens, columns); zeros outside. `columns` is a multiple
// of 4 and rows start at multiples of 8 bytes.
__device__ __forceinline__ void load_columns(uint2 (&words)[TOKENS], const u16* x, int token, int tokens, int column,
                                             int columns) {
#pragma unroll
  for (int t = 0; t < TOKENS; t++) {
    const bool inside = column < columns && token + t < tokens;
    words[t] = inside ? __ldg((const uint2*)(x + (size_t)(token + t) * columns + column)) : make_uint2(0, 0);
  }
}

// The four columns of one token in float32.
__device__ __forceinline__ float4 as_floats(uint2 words) {
  const float2 low = to_float2(words.x), high = to_float2(words.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

// The four columns of two tokens: word i holds both values of column i, the first token's in the lower half.
__device__ __forceinline__ uint4 as_pairs(uint2 first, uint2 second) {
  return make_uint4(permute(first.x, second.x, 0x5410), permute(first.x, second.x, 0x7632),
                    permute(first.y, second.y, 0x5410), permute(first.y, second.y, 0x7632));
}
