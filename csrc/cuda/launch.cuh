// Launches the kernels of one head_dim and type: sets grids and shared memory, and chooses the backward. Grids depend
// on shapes only, so nothing waits for the device.
#pragma once
#include <mutex>
#include <set>
#include <utility>

#include "launch.h"
#include "masked_cross_attention.cuh"
#include "resampler_attention.cuh"

namespace flamingo {
namespace cuda {

#if !defined(FLAMINGO_EMULATOR)
// Lets a kernel use more than 48 KB of shared memory on the current device, and gives it the cache's room. It is done
// once for each kernel and device.
inline cudaError_t allow_shared_memory(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device})) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error == cudaSuccess) allowed.insert({kernel, device});
  else cudaGetLastError();  // clears it; otherwise torch's next check would report it as an error of its own
  return error;
}

template <class Params>
int launch(void (*kernel)(Params), int64_t blocks, int heads, int threads, int shared_bytes, const Params& p,
           void* stream) {
  if (blocks == 0 || heads == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(heads));
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
#endif

inline int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

template <class Params>
int launch_row_ranges(const Params& p, void* stream) {
  const auto blocks = [](int64_t count) { return (count + kPlanThreads - 1) / kPlanThreads; };
  const int error = launch(empty_ranges<Params>, blocks(p.media), 1, kPlanThreads, 0, p, stream);
  return error ? error : launch(plan_rows<Params>, blocks(p.rows), 1, kPlanThreads, 0, p, stream);
}

template <Type kType, int kWidth>
int CrossLaunches<kType, kWidth>::forward(const CrossAttentionParams& p, void* stream) {
  return launch(attention_forward<kType, kWidth, CrossAttention<kWidth>>, tiles_of(p.rows), p.heads, kThreads,
                forward_shared_bytes<kWidth>(), p, stream);
}

template <Type kType, int kWidth>
int CrossLaunches<kType, kWidth>::backward(const CrossAttentionParams& p, void* stream) {
  constexpr int kShared = backward_shared_bytes<kWidth>();
  const int64_t key_blocks = p.media * tiles_of(p.latents), row_tiles = tiles_of(p.rows);
  if (one_block_a_row(p)) {
    const int error = launch(clear_blind_rows<kWidth>, row_tiles, 1, kThreads, 0, p, stream);
    if (error != 0) return error;
    return launch(cross_attention_backward_keys<kType, kWidth, true>, key_blocks, p.key_heads, kThreads, kShared, p,
                  stream);
  }
  const int error = launch(backward_rows<kType, kWidth, CrossAttention<kWidth>, false>, row_tiles, p.heads, kThreads,
                           kShared, p, stream);
  if (error != 0) return error;
  return launch(cross_attention_backward_keys<kType, kWidth, false>, key_blocks, p.key_heads, kThreads, kShared, p,
                stream);
}

template <Type kType, int kWidth>
int ResamplerLaunches<kType, kWidth>::forward(const ResamplerParams& p, void* stream) {
  using Problem = ResamplerAttention<kWidth>;
  constexpr int kShared = forward_shared_bytes<kWidth>();
  const int64_t row_tiles = p.media * tiles_of(p.latents);
  if (p.splits == 1)
    return launch(attention_forward<kType, kWidth, Problem>, row_tiles, p.heads, kThreads, kShared, p, stream);
  const int error = launch(attention_forward<kType, kWidth, Problem, true>, row_tiles * p.splits, p.heads, kThreads,
                           kShared, p, stream);
  if (error != 0) return error;
  const int64_t chunks = static_cast<int64_t>(p.rows) * p.heads * (kWidth / 8);
  return launch(combine_parts<kType, kWidth>, (chunks + kThreads - 1) / kThreads, 1, kThreads, 0, p, stream);
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
