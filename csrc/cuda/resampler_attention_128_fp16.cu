#include "launch.cuh"
template struct flamingo::cuda::ResamplerLaunches<flamingo::cuda::Type::kFloat16, 128>;
