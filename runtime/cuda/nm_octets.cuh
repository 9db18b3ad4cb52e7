// From the packed values of a lane's run of 32 columns to the registers of a product: four pairs for each octet.
// runtime/nm/nm_runs.py has the three orders of values. Needs ptx.cuh, offsets.cuh, GROUP and COUNT.
#pragma once

constexpr int WORDS = 32 / GROUP * COUNT / 2;   // of a lane's run in one row
constexpr int RECORD = (2 * WORDS + 2) * 128;   // bytes of a tile's chunk: words, then masks
constexpr int TABLE_BYTES = 256 * 128;          // 128 bytes a mask: the entry once for every lane that reads together
constexpr bool PAIR = GROUP == 8 && COUNT == 2, ENDS = GROUP == 8 && COUNT == 4;
constexpr bool HELD = GROUP > 8 && COUNT == 4;  // GATHER, but two words are cheaper kept in registers

// ---- the table: for each mask of an octet, how to make its pairs ----------------------------------------------------

// Choose a pair's bytes from (zeros : word): `bits` says which of its two columns are kept, `half` where the value of a
// single one lies. `zero`: two neighbouring zero bytes, as a byte of the selector.
__device__ __forceinline__ u32 choose_bytes(u32 bits, u32 half, u32 zero) {
  const u32 value = half ? 0x32 : 0x10;
  return bits == 3 ? 0x3210 : bits == 2 ? value << 8 | zero : bits == 1 ? zero << 8 | value : zero << 8 | zero;
}

// PAIR: a group's one word holds all: the selectors of pairs 0, 1 in x, 2, 3 in y.
__device__ __forceinline__ uint4 entry_pair(u32 mask) {
  u32 selectors[4];
#pragma unroll
  for (int j = 0; j < 4; j++)
    selectors[j] = choose_bytes(mask >> (2 * j) & 3, __popc(mask & ((1u << (2 * j)) - 1)) > 0, 0x44);
  return make_uint4(selectors[0] | selectors[1] << 16, selectors[2] | selectors[3] << 16, 0, 0);
}

// ENDS: two words hold four values. Pair 0 needs the first word alone, pair 3 the last alone; pair 1 starts after pair
// 0's values (shift in z), pair 2 ends before pair 3's (shift in w). Selectors: pairs 0, 1 in x, 3, 2 in y.
__device__ __forceinline__ uint4 entry_ends(u32 mask) {
  const u32 front = choose_bytes(mask & 3, 0, 0x44) | choose_bytes(mask >> 2 & 3, 0, 0x44) << 16;
  const u32 back = choose_bytes(mask >> 6, 1, 0x44) | choose_bytes(mask >> 4 & 3, 1, 0x44) << 16;
  return make_uint4(front, back, 16 * __popc(mask & 3), 16 * __popc(mask >> 6));
}

// GATHER: a pair's bytes come from one word and from the octet's left value, zeros above it. Lower half of component j:
// selector of pair j; upper half: how many bytes after the octet's first word pair j's lies, but for pair 0, whose word
// is the first or none: bytes to the next octet's first word.
__device__ __forceinline__ uint4 entry_gather(u32 mask) {
  u32 parts[4], words = 0, seen = 0, opened = 0, singles = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) singles += __popc(mask >> (2 * j) & 3) == 1;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u32 bits = mask >> (2 * j) & 3;
    u32 word = 0, half = 0;
    bool left = false;
    if (bits == 3) word = words++;
    if (bits == 1 || bits == 2) {
      left = seen % 2 == 0 && seen + 1 == singles;
      half = seen % 2;
      if (half == 0 && !left) opened = words++;
      word = left ? 0 : opened;
      seen++;
    }
    const u32 selector = left ? (bits == 1 ? 0x7654 : 0x5476) : choose_bytes(bits, half, 0x76);
    parts[j] = selector | word * 128 << 16;
  }
  parts[0] = (parts[0] & 0xffff) | __popc(mask) / 2 * 128 << 16;
  return make_uint4(parts[0], parts[1], parts[2], parts[3]);
}

__device__ __forceinline__ void fill_table(u8* table, int threads) {
  for (int mask = threadIdx.x; mask < 256; mask += threads) {
    const uint4 entry = PAIR ? entry_pair(mask) : ENDS ? entry_ends(mask) : entry_gather(mask);
#pragma unroll
    for (int i = 0; i < 8; i++) {  // neighbouring threads start at different places: no bank conflicts
      const int place = (i + mask) % 8;
      ((uint4*)table)[mask * 8 + place] = PAIR ? make_uint4(entry.x, entry.y, entry.x, entry.y) : entry;
    }
  }
}

// ---- pairs from values ----------------------------------------------------------------------------------------------

// Places in shared memory that a lane reads, as addresses (shared_address).
struct Lane {
  u32 table;  // its column of the table
  u32 words;  // its words of a record
};

__device__ __forceinline__ u32 table_column(u32 table) { return table + threadIdx.x % (PAIR ? 16 : 8) * (PAIR ? 8 : 16); }
__device__ __forceinline__ u32 words_column(u32 record) { return record + threadIdx.x % 32 * (PAIR || ENDS ? 16 : 4); }

// A row's run while its octets are expanded in order.
struct Row {
  u32 mask;
  u32 next;     // GATHER: the lane's first word of the next octet
  u32 held[2];  // GATHER in two words: the first of the next octet, and the one after it
  u32 left[4];  // GATHER: what the octets have left, zeros in the upper half
};

__device__ __forceinline__ u32 read_word(u32 shared) {
  u32 word[1];
  load_shared(word, shared);
  return word[0];
}

// The words of a new group, and the value that each of its octets has left: the n-th left value of a group, found by
// the odd octets before. Where the group's last words hold none, nothing selects them.
__device__ __forceinline__ void open_group(Row& row, u32 words) {
  row.next = words;
#if GROUP > 8
  const u32 last = read_word(words + (COUNT / 2 - 1) * 128);
  if (HELD) row.held[0] = read_word(words), row.held[1] = last;
  const u32 first = last & 0xffff, second = last >> 16;
  row.left[0] = first;
#if GROUP == 16
  row.left[1] = second;
#else
  const u32 before = HELD ? row.held[0] : COUNT > 2 ? read_word(words + (COUNT > 2 ? COUNT / 2 - 2 : 0) * 128) : 0;
  u32 parity = row.mask ^ (row.mask >> 4);
  parity ^= parity >> 2;
  parity ^= parity >> 1;
  const bool odd = parity & 1, odd_too = parity & 0x100;
  row.left[1] = odd ? second : first;
  row.left[2] = odd && odd_too ? before & 0xffff : odd || odd_too ? second : first;
  row.left[3] = odd && odd_too ? before >> 16 : second;
#endif
#endif
}

// Make the four pairs of octet `octet` (0 to 3, in order) of the run in row half `half`.
__device__ __forceinline__ void expand(u32 (&pairs)[4], Row& row, const Lane& lane, int octet, int half) {
  const u32 place = permute(row.mask, 0, 0x4440 + octet) * 128 + lane.table;
#if GROUP == 8 && COUNT == 2
  u32 entry[2];
  load_shared(entry, place);
  const u32 word = read_word(lane.words + octet / 2 * 512 + octet % 2 * 8 + half * 4);
  pairs[0] = permute(word, 0, entry[0]);
  pairs[1] = permute(word, 0, entry[0] >> 16);
  pairs[2] = permute(word, 0, entry[1]);
  pairs[3] = permute(word, 0, entry[1] >> 16);
#elif GROUP == 8 && COUNT == 4
  u32 entry[4], words[2];
  load_shared(entry, place);
  load_shared(words, lane.words + octet * 512 + half * 8);
  pairs[0] = permute(words[0], 0, entry[0]);
  pairs[1] = permute(shift_right(words[0], words[1], entry[2]), 0, entry[0] >> 16);
  pairs[2] = permute(shift_left(words[0], words[1], entry[3]), 0, entry[1] >> 16);
  pairs[3] = permute(words[1], 0, entry[1]);
#else
  const int group = octet * 8 / GROUP, inside = octet % (GROUP / 8);
  if (inside == 0) open_group(row, lane.words + (group * 2 + half) * (COUNT / 2) * 128);
  const u32 left = GROUP > 8 ? row.left[inside] : 0;
  u32 entry[4];
  load_shared(entry, place);
  if (HELD) {
    pairs[0] = permute(row.held[0], left, entry[0]);
#pragma unroll
    for (int j = 1; j < 4; j++) pairs[j] = permute(entry[j] >> 16 ? row.held[1] : row.held[0], left, entry[j]);
    if (entry[0] >> 16) row.held[0] = row.held[1];  // one word on; after two there is none to select
    return;
  }
  pairs[0] = permute(read_word(row.next), left, entry[0]);
#pragma unroll
  for (int j = 1; j < 4; j++) pairs[j] = permute(read_word(row.next + (entry[j] >> 16)), left, entry[j]);
  row.next += entry[0] >> 16;
#endif
}
