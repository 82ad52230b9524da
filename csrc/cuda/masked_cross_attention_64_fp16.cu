#include "launch.cuh"
template struct flamingo::cuda::CrossLaunches<flamingo::cuda::Type::kFloat16, 64>;
