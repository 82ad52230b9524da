// Wraps torch for both libraries: its stable ABI only, so that one build serves torch 2.11 and later.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include <cstdint>
#include <limits>
#include <optional>

namespace flamingo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The checks below repeat those of model/ops/argument_checks.py for callers of torch.ops.flamingo. They keep a kernel
// from reading outside a tensor, and name the argument.
inline void check_width(const Tensor& x, const char* name, int64_t dims, const Tensor& q) {
  STD_TORCH_CHECK(x.dim() == dims, name, " must have ", dims, " dimensions, it has ", x.dim());
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), name, " must have the type of q");
  STD_TORCH_CHECK(x.get_device() == q.get_device() && x.is_cuda() == q.is_cuda(), name,
                  " must be on the device of q");
  STD_TORCH_CHECK(x.size(dims - 1) == q.size(q.dim() - 1), name, " must have the head width of q, got ",
                  x.size(dims - 1));
  STD_TORCH_CHECK(x.stride(dims - 1) == 1 || x.size(dims - 1) == 1, name, " must be contiguous in its last dimension");
}

inline void check_heads(const Tensor& x, const char* name, int64_t dims, const Tensor& q) {
  check_width(x, name, dims, q);
  STD_TORCH_CHECK(x.size(dims - 2) == q.size(q.dim() - 2), name, " must have the heads of q, got ", x.size(dims - 2));
}

inline void check_index(const Tensor& x, const char* name, int64_t size, const Tensor& q) {
  STD_TORCH_CHECK(x.dim() == 1 && x.size(0) == size, name, " must be one-dimensional of size ", size);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Int || x.scalar_type() == ScalarType::Long, name,
                  " must be int32 or int64");
  STD_TORCH_CHECK(x.is_cuda() == q.is_cuda() && x.get_device() == q.get_device(), name,
                  " must be on the device of q");
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline void check_out_scale(const std::optional<Tensor>& x, const Tensor& q) {
  if (!x.has_value()) return;
  STD_TORCH_CHECK(x->numel() == 1 && x->scalar_type() == ScalarType::Float, "out_scale must be one float32 value");
  STD_TORCH_CHECK(x->is_cuda() == q.is_cuda() && x->get_device() == q.get_device(),
                  "out_scale must be on the device of q");
}

inline void check_same_shape(const Tensor& x, const char* name, const Tensor& other, const char* other_name) {
  bool same = x.dim() == other.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = x.size(d) == other.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape of ", other_name);
}

inline void check_masked_cross_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& media_index,
                                         const std::optional<Tensor>& first_media,
                                         const std::optional<Tensor>& out_scale) {
  STD_TORCH_CHECK(q.dim() == 3, "q must be [T, H, D], it has ", q.dim(), " dimensions");
  check_heads(q, "q", 3, q);
  check_width(k, "k", 4, q);
  check_width(v, "v", 4, q);
  check_same_shape(v, "v", k, "k");
  STD_TORCH_CHECK(k.size(2) > 0 && q.size(1) % k.size(2) == 0, "k must have heads that divide those of q, got ",
                  k.size(2));
  STD_TORCH_CHECK(k.size(1) > 0, "k must hold at least one latent of each medium");
  check_index(media_index, "media_index", q.size(0), q);
  if (first_media.has_value()) check_index(*first_media, "first_media", q.size(0), q);
  check_out_scale(out_scale, q);
}

// Ranges of the query rows (tokens) that see each medium: the first rows of all media, then those behind the last ones.
inline void check_token_ranges(const std::optional<Tensor>& ranges, int64_t media, const Tensor& q) {
  if (!ranges.has_value()) return;
  STD_TORCH_CHECK(ranges->dim() == 2 && ranges->size(0) == 2 && ranges->size(1) == media,
                  "token_ranges must be [2, media] with ", media, " media");
  STD_TORCH_CHECK(ranges->scalar_type() == ScalarType::Int && ranges->is_contiguous(),
                  "token_ranges must be contiguous int32");
  STD_TORCH_CHECK(ranges->is_cuda() == q.is_cuda() && ranges->get_device() == q.get_device(),
                  "token_ranges must be on the device of q");
}

inline void check_media_token_ranges(const Tensor& media_index, const std::optional<Tensor>& first_media,
                                     int64_t media) {
  const int64_t most = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(media >= 0 && media < most && media_index.numel() < most,
                  "media and media_index must be fewer than 2^31, got ", media, " and ", media_index.numel());
  check_index(media_index, "media_index", media_index.numel(), media_index);
  if (first_media.has_value()) check_index(*first_media, "first_media", media_index.numel(), media_index);
}

inline void check_resampler_attention(const Tensor& q, const Tensor& k_features, const Tensor& v_features,
                                      const Tensor& k_latents, const Tensor& v_latents, const Tensor& cu_media) {
  STD_TORCH_CHECK(q.dim() == 4, "q must be [M, R, H, D], it has ", q.dim(), " dimensions");
  check_heads(q, "q", 4, q);
  check_heads(k_features, "k_features", 3, q);
  check_heads(v_features, "v_features", 3, q);
  check_heads(k_latents, "k_latents", 4, q);
  check_heads(v_latents, "v_latents", 4, q);
  check_same_shape(v_features, "v_features", k_features, "k_features");
  check_same_shape(k_latents, "k_latents", q, "q");
  check_same_shape(v_latents, "v_latents", q, "q");
  check_index(cu_media, "cu_media", q.size(0) + 1, q);
}

}  // namespace flamingo
