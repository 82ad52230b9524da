#include "launch.cuh"

int flamingo::cuda::find_row_ranges(const CrossAttentionParams& p, void* stream) { return launch_row_ranges(p, stream); }
