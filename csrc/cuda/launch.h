// Declares the launches of one op for one head_dim and type. Each has its own file, so that they compile in parallel.
#pragma once
#include "params.h"

namespace flamingo {
namespace cuda {

// Returns a cudaError_t. `stream` is a cudaStream_t.
typedef int (*CrossLaunch)(const CrossAttentionParams&, void* stream);
typedef int (*ResamplerLaunch)(const ResamplerParams&, void* stream);

// Writes the row ranges of all media, which the backward of the cross-attention needs.
int find_row_ranges(const CrossAttentionParams& p, void* stream);

template <Type kType, int kWidth>
struct CrossLaunches {
  static int forward(const CrossAttentionParams& p, void* stream);
  static int backward(const CrossAttentionParams& p, void* stream);
};

template <Type kType, int kWidth>
struct ResamplerLaunches {
  static int forward(const ResamplerParams& p, void* stream);
  static int backward(const ResamplerParams& p, void* stream);
};

}  // namespace cuda
}  // namespace flamingo
