// Launches the kernels of one head_dim and type: sets grids and shared memory, and chooses the backward. Grids depend
// on shapes only, so nothing waits for the device.
#pragma once
#include "launch.h"
#include "masked_cross_attention.cuh"
#include "resampler_attention.cuh"

namespace flamingo {
namespace cuda {

#if !defined(FLAMINGO_EMULATOR)
template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int heads, int threads, int shared_bytes, const Params& p,
           void* stream) {
  if (blocks == 0 || heads == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(heads));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
#endif

inline int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

template <Type kType, int kWidth>
int CrossLaunches<kType, kWidth>::forward(const CrossAttentionParams& p, void* stream) {
  return launch(attention_forward<kType, kWidth, CrossAttention<kWidth>>, tiles_of(p.rows), p.heads, kThreads,
                forward_shared_bytes<kWidth>(), p, stream);
}

template <Type kType, int kWidth>
int CrossLaunches<kType, kWidth>::backward(const CrossAttentionParams& p, void* stream) {
  constexpr int kShared = backward_shared_bytes<kWidth>();
  const int64_t key_blocks = p.media * tiles_of(p.latents), row_tiles = tiles_of(p.rows);
  const int planned = launch(plan_rows<CrossAttentionParams>, 1, 1, kPlanThreads, 0, p, stream);
  if (planned != 0) return planned;
  if (one_block_a_row(p))
    return launch(cross_attention_backward_keys<kType, kWidth, true>, key_blocks + row_tiles, p.heads, kThreads,
                  kShared, p, stream);
  const int error = launch(backward_rows<kType, kWidth, CrossAttention<kWidth>, false>, row_tiles, p.heads, kThreads,
                           kShared, p, stream);
  if (error != 0) return error;
  return launch(cross_attention_backward_keys<kType, kWidth, false>, key_blocks, p.heads, kThreads, kShared, p,
                stream);
}

template <Type kType, int kWidth>
int ResamplerLaunches<kType, kWidth>::forward(const ResamplerParams& p, void* stream) {
  return launch(attention_forward<kType, kWidth, ResamplerAttention<kWidth>>, p.media * tiles_of(p.latents), p.heads,
                kThreads, forward_shared_bytes<kWidth>(), p, stream);
}

template <Type kType, int kWidth>
int ResamplerLaunches<kType, kWidth>::backward(const ResamplerParams& p, void* stream) {
  constexpr int kShared = backward_shared_bytes<kWidth>();
  using Problem = ResamplerAttention<kWidth>;
  const int64_t row_tiles = p.media * tiles_of(p.latents);
  if (p.latents <= kTile)
    return launch(backward_rows<kType, kWidth, Problem, true>, row_tiles, p.heads, kThreads, kShared, p, stream);
  const int error =
      launch(backward_rows<kType, kWidth, Problem, false>, row_tiles, p.heads, kThreads, kShared, p, stream);
  if (error != 0) return error;
  const int64_t slots = p.features / kTile + p.media + row_tiles;
  return launch(resampler_backward_keys<kType, kWidth>, slots, p.heads, kThreads, kShared, p, stream);
}

}  // namespace cuda
}  // namespace flamingo
