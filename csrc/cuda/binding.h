// Turns tensors into the arguments of the kernels.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../include/tensors.h"
#include "launch.h"

namespace flamingo {
namespace cuda {

inline Type type_of(const Tensor& q) {
  const bool bfloat16 = q.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(bfloat16 || q.scalar_type() == ScalarType::Half, "q must be bfloat16 or float16 on CUDA");
  return bfloat16 ? Type::kBFloat16 : Type::kFloat16;
}

// Returns the launch for the type and head_dim of q: `Launches<type, width>::*` chosen at run time.
template <template <Type, int> class Launches, class Function>
int with_launches(const Tensor& q, Function function) {
  const Type type = type_of(q);
  const int64_t width = q.size(q.dim() - 1);
  const bool bfloat16 = type == Type::kBFloat16;
  if (width == 64)
    return bfloat16 ? function(Launches<Type::kBFloat16, 64>()) : function(Launches<Type::kFloat16, 64>());
  if (width == 96)
    return bfloat16 ? function(Launches<Type::kBFloat16, 96>()) : function(Launches<Type::kFloat16, 96>());
  STD_TORCH_CHECK(width == 128, "the head width must be 64, 96 or 128 on CUDA, got ", width);
  return bfloat16 ? function(Launches<Type::kBFloat16, 128>()) : function(Launches<Type::kFloat16, 128>());
}

// Returns the tensor, copied if its rows do not start at multiples of 16 bytes, which the kernels' copies need.
inline Tensor with_aligned_rows(const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(x.dim() - 1) == 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) aligned = aligned && (x.stride(d) % 8 == 0 || x.size(d) == 1);
  return aligned ? x : torch::stable::contiguous(x);
}

// Does the same, with the leading two dimensions at one stride, so that they can be numbered together.
inline Tensor with_uniform_rows(const Tensor& x) {
  const bool uniform = x.size(0) == 1 || x.stride(0) == x.size(1) * x.stride(1);
  return with_aligned_rows(uniform ? x : torch::stable::contiguous(x));
}

inline const uint16_t* in(const Tensor& x) { return static_cast<const uint16_t*>(x.data_ptr()); }
inline uint16_t* out(const Tensor& x) { return static_cast<uint16_t*>(x.data_ptr()); }
inline float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }
inline Index index_of(const Tensor& x) { return {x.data_ptr(), x.scalar_type() == ScalarType::Long}; }

inline Tensor empty_contiguous(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

inline void* current_stream(const Tensor& q) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.get_device_index(), &stream));
  return stream;
}

}  // namespace cuda
}  // namespace flamingo
