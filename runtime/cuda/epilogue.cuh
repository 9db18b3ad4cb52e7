// What follows the sum in float32, before it is rounded once: bias, then activation.
// ACTIVATION: 0 none, 1 relu, 2 gelu (the exact one, by erf), 3 silu. runtime/rows.py has the same numbers.
#pragma once

#ifndef ACTIVATION
#define ACTIVATION 0
#endif

__device__ __forceinline__ float finish(float sum, const u16* bias, int row) {
  if (bias != nullptr) sum += to_float(bias[row]);
#if ACTIVATION == 1
  return sum < 0.0f ? 0.0f : sum;  // NaN stays NaN
#elif ACTIVATION == 2
  return 0.5f * sum * (1.0f + erff(sum * 0.70710678118654752f));
#elif ACTIVATION == 3
  return sum / (1.0f + expf(-sum));
#else
  return sum;
#endif
}
