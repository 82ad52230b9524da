#include "launch.cuh"
template struct flamingo::cuda::CrossLaunches<flamingo::cuda::Type::kBFloat16, 128>;
