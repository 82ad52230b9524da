#include "launch.cuh"
template struct flamingo::cuda::ResamplerLaunches<flamingo::cuda::Type::kBFloat16, 96>;
