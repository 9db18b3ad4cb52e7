// The functions of runtime/cuda/offsets.cuh in plain C++: see there for what each one does.
#pragma once

inline u32 first_one(u32 word) {
  if (word == 0) emulator::fail("first_one: no bit is set");
  return (u32)__clz((int)word);
}
inline u32 next_change(u32 word) {
  if (word == 0 || word == ~0u) emulator::fail("next_change: all bits are equal");
  return (u32)__clz((int)(word >> 31 ? ~word : word));
}
inline u32 weigh_bytes(u32 bytes, u32 weights, u32 start) {
  for (int i = 0; i < 32; i += 8) start += ((bytes >> i) & 255u) * ((weights >> i) & 255u);
  return start;
}

template <class T>
inline void load_shared(T& v, u32 shared) {
  __builtin_memcpy(&v, emulator::shared_place(shared, sizeof(T), sizeof(T), "load_shared"), sizeof(T));
}
