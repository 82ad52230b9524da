// Binds flamingo::masked_cross_attention on CUDA.
#include <cuda_runtime.h>

#include "binding.h"

namespace flamingo {
namespace cuda {
namespace {

CrossAttentionParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& media_index,
                                 const std::optional<Tensor>& first_media, const std::optional<Tensor>& out_scale,
                                 double scale) {
  CrossAttentionParams p = {};
  p.q = in(q);
  p.q_row = q.stride(0);
  p.q_head = q.stride(1);
  p.rows = static_cast<int>(q.size(0));
  p.heads = static_cast<int>(q.size(1));
  p.scale = static_cast<float>(scale);
  p.out_scale = out_scale.has_value() ? floats(*out_scale) : nullptr;
  p.k = in(k);
  p.v = in(v);
  p.k_medium = k.stride(0);
  p.k_latent = k.stride(1);
  p.k_head = k.stride(2);
  p.v_medium = v.stride(0);
  p.v_latent = v.stride(1);
  p.v_head = v.stride(2);
  p.media = static_cast<int>(k.size(0));
  p.latents = static_cast<int>(k.size(1));
  p.key_heads = static_cast<int>(k.size(2));
  p.shared_by = p.heads / p.key_heads;
  p.last_media = index_of(media_index);
  if (first_media.has_value()) p.first_media = index_of(*first_media);
  return p;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& media_index,
           const std::optional<Tensor>& first_media, const std::optional<Tensor>& out_scale) {
  check_masked_cross_attention(q, k, v, media_index, first_media, out_scale);
  const int64_t most = std::numeric_limits<int32_t>::max() - kTile;
  STD_TORCH_CHECK(q.size(0) < most && k.size(0) * (k.size(1) + kTile) < most, "q and k must have fewer than 2^31 rows");
  STD_TORCH_CHECK(q.size(1) < 65536, "q must have fewer than 65536 heads");
}

// Points the parameters to the ranges.
void use_ranges(CrossAttentionParams& p, const Tensor& ranges) {
  p.row_begin = static_cast<int*>(ranges.data_ptr());
  p.row_end = p.row_begin + ranges.size(1);
}

}  // namespace

Tensor media_token_ranges(const Tensor& media_index, const std::optional<Tensor>& first_media, int64_t media) {
  check_media_token_ranges(media_index, first_media, media);
  const torch::stable::accelerator::DeviceGuard guard(media_index.get_device_index());
  const Tensor ranges = torch::stable::new_empty(media_index, {2, media}, ScalarType::Int);
  CrossAttentionParams p = {};
  p.rows = static_cast<int>(media_index.size(0));
  p.media = static_cast<int>(media);
  p.last_media = index_of(media_index);
  if (first_media.has_value()) p.first_media = index_of(*first_media);
  use_ranges(p, ranges);
  const int error = find_row_ranges(p, current_stream(media_index));
  STD_TORCH_CHECK(error == 0, "media_token_ranges: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  return ranges;
}

Tensor masked_cross_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& media_index,
                              const std::optional<Tensor>& first_media, const std::optional<Tensor>& out_scale,
                              double scale, const std::optional<Tensor>& token_ranges) {
  check(q_any, k_any, v_any, media_index, first_media, out_scale);
  check_token_ranges(token_ranges, k_any.size(0), q_any);
  const torch::stable::accelerator::DeviceGuard guard(q_any.get_device_index());
  const Tensor q = with_aligned_rows(q_any), k = with_aligned_rows(k_any), v = with_aligned_rows(v_any);
  Tensor result = empty_contiguous(q);
  CrossAttentionParams p = make_params(q, k, v, media_index, first_media, out_scale, scale);
  p.out = out(result);
  const int error = with_launches<CrossLaunches>(
      q, [&](auto launches) { return decltype(launches)::forward(p, current_stream(q)); });
  STD_TORCH_CHECK(error == 0, "masked_cross_attention: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  return result;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_cross_attention_backward(
    const Tensor& grad_any, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& media_index,
    const std::optional<Tensor>& first_media, const std::optional<Tensor>& out_scale, double scale,
    const std::optional<Tensor>& token_ranges) {
  check(q_any, k_any, v_any, media_index, first_media, out_scale);
  check_token_ranges(token_ranges, k_any.size(0), q_any);
  check_heads(grad_any, "grad", 3, q_any);
  check_same_shape(grad_any, "grad", q_any, "q");
  const torch::stable::accelerator::DeviceGuard guard(q_any.get_device_index());
  const Tensor q = with_aligned_rows(q_any), k = with_aligned_rows(k_any), v = with_aligned_rows(v_any);
  const Tensor grad = with_aligned_rows(grad_any);
  Tensor dq = empty_contiguous(q), dk = empty_contiguous(k), dv = empty_contiguous(v);
  CrossAttentionParams p = make_params(q, k, v, media_index, first_media, out_scale, scale);
  p.grad = in(grad);
  p.grad_row = grad.stride(0);
  p.grad_head = grad.stride(1);
  p.dq = out(dq);
  p.dk = out(dk);
  p.dv = out(dv);

  const int64_t tiles = (q.size(0) + kTile - 1) / kTile;
  p.splits = wanted_splits(p);
  const int64_t partials = one_block_a_row(p) ? p.splits * k.size(0) * p.key_heads : tiles * p.heads;
  const int64_t statistics = one_block_a_row(p) ? 0 : q.size(0) * p.heads;
  const Tensor partial = torch::stable::new_empty(q, {partials, 4}, ScalarType::Float);
  const Tensor lse = torch::stable::new_empty(q, {2, statistics}, ScalarType::Float);
  const Tensor ranges =
      token_ranges.has_value() ? *token_ranges : media_token_ranges(media_index, first_media, k.size(0));
  const Tensor parts = torch::stable::new_empty(q, {p.splits, 2, p.splits == 1 ? 0 : k.numel()}, ScalarType::Float);
  const Tensor order = torch::stable::new_empty(q, {one_block_a_row(p) ? p.media : 0}, ScalarType::Int);
  p.parts = floats(parts);
  p.order = static_cast<int*>(order.data_ptr());
  p.partial = floats(partial);
  p.lse = floats(lse);
  p.delta = floats(lse) + statistics;
  use_ranges(p, ranges);
  const int error = with_launches<CrossLaunches>(
      q, [&](auto launches) { return decltype(launches)::backward(p, current_stream(q)); });
  STD_TORCH_CHECK(error == 0,
                  "masked_cross_attention_backward: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  return std::make_tuple(dq, dk, dv, torch::stable::view(torch::stable::sum(partial), {1}));
}

STABLE_TORCH_LIBRARY_IMPL(flamingo, CUDA, m) {
  m.impl("media_token_ranges", TORCH_BOX(&media_token_ranges));
  m.impl("masked_cross_attention", TORCH_BOX(&masked_cross_attention));
  m.impl("masked_cross_attention_backward", TORCH_BOX(&masked_cross_attention_backward));
}

}  // namespace cuda
}  // namespace flamingo
