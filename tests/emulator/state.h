// What the parts of the machine share: one launch at a time, the blocks of one cluster at a time.
#pragma once

#include <pthread.h>

#include "fibers.h"

namespace emulator {

struct Meeting {
  const char* name;
  Compute compute;
  u32 mask;
  std::vector<void*> slots;
  std::vector<Fiber*> arrived;
};

struct Machine {
  const Launch* launch = nullptr;
  Invoke invoke = nullptr;
  std::vector<u64> values;
  std::vector<Guarded> memories;
  std::vector<Guarded> shared;  // one a block of the cluster

  std::vector<Fiber*> pool;
  u32 warps = 0, blocks = 0, fibers = 0;  // warps a block, blocks a cluster, fibers in it
  std::vector<std::vector<Fiber*>> runnable;  // by warp
  std::vector<u32> busy, busy_place;           // warps with runnable fibers, and where each stands in that list
  std::vector<u32> priority;                   // of each warp
  std::vector<Fiber*> polling;
  std::vector<u32> alive;                      // threads left, by block
  std::vector<std::vector<Meeting>> meetings;  // by unit: warps, warpgroups, blocks, the cluster

  Fiber* current = nullptr;
  u32 last_warp = 0, policy = 0;
  u64 random = 0;
  pthread_t thread;
  jmp_buf scheduler;
  sigjmp_buf stopped;
};

extern Machine machine;

// waiting.cpp
u32 below(u32 limit);  // a random number below it
u64 next_random();
void make_runnable(Fiber* fiber);
u32 unit_of(Scope scope, const Fiber* fiber);
void run_fibers();  // until all have ended
[[noreturn]] void stop();

}  // namespace emulator
