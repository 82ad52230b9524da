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
int launch(void (*kernel)(Params), const Grid& grid, int threads, int shared_bytes, const Params& p, void* stream) {
  if (grid.blocks == 0 || grid.heads == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const dim3 all(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.heads),
                 static_cast<unsigned>(grid.splits));
  kernel<<<all, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}
#endif

inline int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }

// Returns the blocks of a kernel whose threads have eight columns of a row each.
template <int kWidth>
int64_t blocks_of_chunks(int64_t rows) {
  return (rows * (kWidth / 8) + kThreads - 1) / kThreads;
}

template <class Params>
int launch_row_ranges(const Params& p, void* stream) {
  const auto grid = [](int64_t count) { return Grid{(count + kPlanThreads - 1) / kPlanThreads, 1}; };
  const int error = launch(empty_ranges<Params>, grid(p.media), kPlanThreads, 0, p, stream);
  return error ? error : launch(plan_rows<Params>, grid(p.rows), kPlanThreads, 0, p, stream);
}

template <Type kType, int kWidth>
int CrossLaunches<kType, kWidth>::forward(const CrossAttentionParams& p, void* stream) {
  return launch(attention_forward<kType, kWidth, CrossAttention<kWidth>>, {tiles_of(p.rows), p.heads}, kThreads,
                forward_shared_bytes<kWidth>(), p, stream);
}

// Launches the kernel that owns keys.
template <Type kType, int kWidth, bool kWritesRows, bool kSplits>
int launch_backward_keys(const CrossAttentionParams& p, void* stream) {
  constexpr int kShared = backward_shared_bytes<kWidth>(), kMost = 65535;  // a grid has no more blocks in y
  const auto kernel = cross_attention_backward_keys<kType, kWidth, kWritesRows, kSplits>;
  if (!kLongestFirst<kWidth, kWritesRows>)
    return launch(kernel, {p.media * tiles_of(p.latents), p.key_heads, p.splits}, kThreads, kShared, p, stream);
  int error = 0;
  CrossAttentionParams some = p;
  for (int left = p.media; left > 0 && error == 0; left -= kMost, some.order += kMost)
    error = launch(kernel, {p.key_heads, left < kMost ? left : kMost, p.splits}, kThreads, kShared, some, stream);
  return error;
}

// Does the same, and with splits adds the parts.
template <Type kType, int kWidth, bool kWritesRows>
int launch_backward_keys(const CrossAttentionParams& p, void* stream) {
  if (p.splits == 1) return launch_backward_keys<kType, kWidth, kWritesRows, false>(p, stream);
  const int error = launch_backward_keys<kType, kWidth, kWritesRows, true>(p, stream);
  if (error != 0) return error;
  const int64_t keys = static_cast<int64_t>(p.media) * p.latents * p.key_heads;
  return launch(sum_key_parts<kType, kWidth>, {blocks_of_chunks<kWidth>(keys), 2}, kThreads, 0, p, stream);
}

template <Type kType, int kWidth>
int CrossLaunches<kType, kWidth>::backward(const CrossAttentionParams& p, void* stream) {
  const int64_t row_tiles = tiles_of(p.rows);
  if (one_block_a_row(p)) {
    const int64_t blocks = row_tiles > 0 ? row_tiles : 1;  // without rows, too, the media need an order
    const int error = launch(clear_blind_rows<kWidth>, {blocks, 1}, kThreads, 0, p, stream);
    return error ? error : launch_backward_keys<kType, kWidth, true>(p, stream);
  }
  const int error = launch(backward_rows<kType, kWidth, CrossAttention<kWidth>, false>, {row_tiles, p.heads}, kThreads,
                           backward_shared_bytes<kWidth>(), p, stream);
  return error ? error : launch_backward_keys<kType, kWidth, false>(p, stream);
}

template <Type kType, int kWidth>
int ResamplerLaunches<kType, kWidth>::forward(const ResamplerParams& p, void* stream) {
  using Problem = ResamplerAttention<kWidth>;
  constexpr int kShared = forward_shared_bytes<kWidth>();
  const Grid grid = {p.media * tiles_of(p.latents), p.heads, p.splits};
  if (p.splits == 1) return launch(attention_forward<kType, kWidth, Problem>, grid, kThreads, kShared, p, stream);
  const int error = launch(attention_forward<kType, kWidth, Problem, true>, grid, kThreads, kShared, p, stream);
  if (error != 0) return error;
  const int64_t chunk_blocks = blocks_of_chunks<kWidth>(static_cast<int64_t>(p.rows) * p.heads);
  return launch(combine_parts<kType, kWidth>, {chunk_blocks, 1}, kThreads, 0, p, stream);
}

// Launches the kernel that owns rows, and with splits the sum of its parts.
template <Type kType, int kWidth, bool kWritesKeys>
int launch_backward_rows(const ResamplerParams& p, void* stream) {
  using Problem = ResamplerAttention<kWidth>;
  constexpr int kShared = backward_shared_bytes<kWidth>();
  const Grid grid = {p.media * tiles_of(p.latents), p.heads, p.splits};
  if (p.splits == 1)
    return launch(backward_rows<kType, kWidth, Problem, kWritesKeys>, grid, kThreads, kShared, p, stream);
  const int error = launch(backward_rows<kType, kWidth, Problem, kWritesKeys, true>, grid, kThreads, kShared, p, stream);
  if (error != 0) return error;
  const int64_t chunk_blocks = blocks_of_chunks<kWidth>(static_cast<int64_t>(p.rows) * p.heads);
  return launch(sum_row_parts<kType, kWidth>, {chunk_blocks, 1}, kThreads, 0, p, stream);
}

template <Type kType, int kWidth>
int ResamplerLaunches<kType, kWidth>::backward(const ResamplerParams& p, void* stream) {
  if (p.latents <= kTile) return launch_backward_rows<kType, kWidth, true>(p, stream);
  const int error = launch_backward_rows<kType, kWidth, false>(p, stream);
  if (error != 0) return error;
  const int64_t slots = p.features / kTile + p.media + p.media * tiles_of(p.latents);
  return launch(resampler_backward_keys<kType, kWidth>, {slots, p.heads}, kThreads, backward_shared_bytes<kWidth>(), p,
                stream);
}

}  // namespace cuda
}  // namespace flamingo
