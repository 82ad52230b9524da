// Binds flamingo::resampler_attention on CUDA.
#include <cuda_runtime.h>

#include <tuple>

#include "binding.h"

namespace flamingo {
namespace cuda {
namespace {

// Holds the inputs as the kernels read them, and the copies of inputs that had to be copied.
struct Inputs {
  Tensor q, k_features, v_features, k_latents, v_latents;

  Inputs(const Tensor& q, const Tensor& k_features, const Tensor& v_features, const Tensor& k_latents,
         const Tensor& v_latents)
      : q(with_uniform_rows(q)),
        k_features(with_aligned_rows(k_features)),
        v_features(with_aligned_rows(v_features)),
        k_latents(with_uniform_rows(k_latents)),
        v_latents(with_uniform_rows(v_latents)) {}
};

ResamplerParams make_params(const Inputs& x, const Tensor& cu_media, double scale) {
  ResamplerParams p = {};
  p.q = in(x.q);
  p.q_row = x.q.stride(1);
  p.q_head = x.q.stride(2);
  p.media = static_cast<int>(x.q.size(0));
  p.latents = static_cast<int>(x.q.size(1));
  p.heads = static_cast<int>(x.q.size(2));
  p.rows = p.media * p.latents;
  p.features = static_cast<int>(x.k_features.size(0));
  p.scale = static_cast<float>(scale);
  p.k_features = in(x.k_features);
  p.v_features = in(x.v_features);
  p.k_latents = in(x.k_latents);
  p.v_latents = in(x.v_latents);
  p.k_features_row = x.k_features.stride(0);
  p.k_features_head = x.k_features.stride(1);
  p.v_features_row = x.v_features.stride(0);
  p.v_features_head = x.v_features.stride(1);
  p.k_latents_row = x.k_latents.stride(1);
  p.k_latents_head = x.k_latents.stride(2);
  p.v_latents_row = x.v_latents.stride(1);
  p.v_latents_head = x.v_latents.stride(2);
  p.cu_media = index_of(cu_media);
  return p;
}

void check(const Tensor& q, const Tensor& k_features, const Tensor& v_features, const Tensor& k_latents,
           const Tensor& v_latents, const Tensor& cu_media) {
  check_resampler_attention(q, k_features, v_features, k_latents, v_latents, cu_media);
  const int64_t most = std::numeric_limits<int32_t>::max() - kTile;
  STD_TORCH_CHECK(k_features.size(0) + q.size(0) * (q.size(1) + 2 * kTile) < most,
                  "q and k_features must have fewer than 2^31 rows");
  STD_TORCH_CHECK(q.size(1) > 0, "q must hold at least one latent of each medium");
  STD_TORCH_CHECK(q.size(2) < 65536, "q must have fewer than 65536 heads");
}

}  // namespace

std::tuple<Tensor, Tensor> resampler_attention(const Tensor& q, const Tensor& k_features, const Tensor& v_features,
                                               const Tensor& k_latents, const Tensor& v_latents,
                                               const Tensor& cu_media, double scale) {
  check(q, k_features, v_features, k_latents, v_latents, cu_media);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs x(q, k_features, v_features, k_latents, v_latents);
  Tensor result = empty_contiguous(q);
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  ResamplerParams p = make_params(x, cu_media, scale);
  p.out = out(result);
  p.lse = floats(lse);
  p.splits = wanted_splits(p);
  const int64_t part = p.splits == 1 ? 0 : lse.numel();
  const Tensor parts = torch::stable::new_empty(lse, {p.splits, part, q.size(3) + 1});
  p.parts = floats(parts);
  p.part_lse = p.parts + p.splits * part * q.size(3);
  const int error = with_launches<ResamplerLaunches>(
      q, [&](auto launches) { return decltype(launches)::forward(p, current_stream(q)); });
  STD_TORCH_CHECK(error == 0, "resampler_attention: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  return std::make_tuple(result, lse);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> resampler_attention_backward(
    const Tensor& grad_any, const Tensor& o, const Tensor& lse, const Tensor& q, const Tensor& k_features,
    const Tensor& v_features, const Tensor& k_latents, const Tensor& v_latents, const Tensor& cu_media,
    double scale) {
  check(q, k_features, v_features, k_latents, v_latents, cu_media);
  check_heads(grad_any, "grad", 4, q);
  check_same_shape(grad_any, "grad", q, "q");
  check_same_shape(o, "out", q, "q");
  STD_TORCH_CHECK(o.is_contiguous() && lse.is_contiguous() && lse.numel() == q.size(0) * q.size(1) * q.size(2),
                  "out and lse must be what the forward returned");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs x(q, k_features, v_features, k_latents, v_latents);
  const Tensor grad = with_uniform_rows(grad_any);
  Tensor dq = empty_contiguous(q);
  Tensor dk_features = empty_contiguous(k_features), dv_features = empty_contiguous(v_features);
  Tensor dk_latents = empty_contiguous(k_latents), dv_latents = empty_contiguous(v_latents);
  const Tensor delta = torch::stable::new_empty(lse, lse.sizes());
  ResamplerParams p = make_params(x, cu_media, scale);
  p.grad = in(grad);
  p.grad_row = grad.stride(1);
  p.grad_head = grad.stride(2);
  p.o = in(o);
  p.lse = floats(lse);
  p.delta = floats(delta);
  p.splits = wanted_splits(p);
  const Tensor parts = torch::stable::new_empty(lse, {p.splits, p.splits == 1 ? 0 : q.numel()});
  p.parts = floats(parts);
  p.dq = out(dq);
  p.dk_features = out(dk_features);
  p.dv_features = out(dv_features);
  p.dk_latents = out(dk_latents);
  p.dv_latents = out(dv_latents);
  const int error = with_launches<ResamplerLaunches>(
      q, [&](auto launches) { return decltype(launches)::backward(p, current_stream(q)); });
  STD_TORCH_CHECK(error == 0, "resampler_attention_backward: ", cudaGetErrorString(static_cast<cudaError_t>(error)));
  return std::make_tuple(dq, dk_features, dv_features, dk_latents, dv_latents);
}

STABLE_TORCH_LIBRARY_IMPL(flamingo, CUDA, m) {
  m.impl("resampler_attention", TORCH_BOX(&resampler_attention));
  m.impl("resampler_attention_backward", TORCH_BOX(&resampler_attention_backward));
}

}  // namespace cuda
}  // namespace flamingo
