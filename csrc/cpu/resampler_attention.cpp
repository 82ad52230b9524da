// Implements flamingo::resampler_attention on the CPU. A task is one medium and one head; its keys are two segments.
#include <tuple>

#include "run.h"

namespace flamingo {
namespace cpu {
namespace {

std::vector<int64_t> checked_offsets(const Tensor& cu_media, int64_t features) {
  const std::vector<int64_t> offsets = values_of(cu_media);
  STD_TORCH_CHECK(offsets.front() == 0 && offsets.back() == features, "cu_media must go from 0 to ", features,
                        " (the rows of k_features), it goes from ", offsets.front(), " to ", offsets.back());
  for (size_t m = 1; m < offsets.size(); ++m)
    STD_TORCH_CHECK(offsets[m] >= offsets[m - 1], "cu_media must not decrease, cu_media[", m, "] is ",
                          offsets[m], " after ", offsets[m - 1]);
  return offsets;
}

struct Inputs {
  const Tensor &q, &k_features, &v_features, &k_latents, &v_latents;
  std::vector<int64_t> offsets;
  float scale;
};

Group make_group(const Inputs& in, int64_t medium, int64_t head) {
  Group group = {};
  group.row_count = in.q.size(1);
  group.q = at(in.q, medium, in.q.stride(0), head);
  group.heads = 1;
  group.q_stride = in.q.stride(1);
  group.segment_count = 2;
  KeySegment& features = group.segments[0];
  features.count = in.offsets[medium + 1] - in.offsets[medium];
  features.k = at(in.k_features, in.offsets[medium], in.k_features.stride(0), head);
  features.v = at(in.v_features, in.offsets[medium], in.v_features.stride(0), head);
  features.k_stride = in.k_features.stride(0);
  features.v_stride = in.v_features.stride(0);
  KeySegment& latents = group.segments[1];
  latents.count = in.q.size(1);
  latents.k = at(in.k_latents, medium, in.k_latents.stride(0), head);
  latents.v = at(in.v_latents, medium, in.v_latents.stride(0), head);
  latents.k_stride = in.k_latents.stride(1);
  latents.v_stride = in.v_latents.stride(1);
  group.width = in.q.size(3);
  group.scale = in.scale;
  group.out_scale = 1.0f;
  return group;
}

Tensor empty_contiguous(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

}  // namespace

std::tuple<Tensor, Tensor> resampler_attention(const Tensor& q, const Tensor& k_features, const Tensor& v_features,
                                               const Tensor& k_latents, const Tensor& v_latents,
                                               const Tensor& cu_media, double scale) {
  check_resampler_attention(q, k_features, v_features, k_latents, v_latents, cu_media);
  const int storage = static_cast<int>(storage_of(q));
  const int64_t media = q.size(0), latents = q.size(1), heads = q.size(2);
  const Inputs in = {q, k_features, v_features, k_latents, v_latents, checked_offsets(cu_media, k_features.size(0)),
                     static_cast<float>(scale)};
  Tensor out = empty_contiguous(q);
  Tensor lse = torch::stable::new_empty(q, {media, latents, heads}, ScalarType::Float);

  const auto group_of = [&](int64_t i) {
    const int64_t medium = i / heads, head = i % heads;
    Group group = make_group(in, medium, head);
    group.out = at(out, medium, out.stride(0), head);
    group.out_stride = out.stride(1);
    group.lse = static_cast<float*>(lse.data_ptr()) + medium * latents * heads + head;
    group.lse_stride = heads;
    return group;
  };
  run_tasks(
      media * heads, [&](int64_t i) { return forward_scratch_bytes(group_of(i)); },
      [&](int64_t i, void* scratch) { kernels().forward[storage](group_of(i), scratch); });
  return std::make_tuple(out, lse);
}

// Only the CUDA kernels need the output and lse of the forward; here the softmax is recomputed.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> resampler_attention_backward(
    const Tensor& grad, const Tensor& /*out*/, const Tensor& /*lse*/, const Tensor& q, const Tensor& k_features,
    const Tensor& v_features, const Tensor& k_latents, const Tensor& v_latents, const Tensor& cu_media,
    double scale) {
  check_resampler_attention(q, k_features, v_features, k_latents, v_latents, cu_media);
  check_heads(grad, "grad", 4, q);
  check_same_shape(grad, "grad", q, "q");
  const int storage = static_cast<int>(storage_of(q));
  const int64_t media = q.size(0), heads = q.size(2);
  const Inputs in = {q, k_features, v_features, k_latents, v_latents, checked_offsets(cu_media, k_features.size(0)),
                     static_cast<float>(scale)};
  Tensor dq = empty_contiguous(q);
  Tensor dk_features = empty_contiguous(k_features), dv_features = empty_contiguous(v_features);
  Tensor dk_latents = empty_contiguous(k_latents), dv_latents = empty_contiguous(v_latents);

  const auto group_of = [&](int64_t i) {
    const int64_t medium = i / heads, head = i % heads;
    Group group = make_group(in, medium, head);
    group.grad = at(grad, medium, grad.stride(0), head);
    group.grad_stride = grad.stride(1);
    group.out = at(dq, medium, dq.stride(0), head);
    group.out_stride = dq.stride(1);
    group.segments[0].dk = at(dk_features, in.offsets[medium], dk_features.stride(0), head);
    group.segments[0].dv = at(dv_features, in.offsets[medium], dv_features.stride(0), head);
    group.segments[0].d_stride = dk_features.stride(0);
    group.segments[1].dk = at(dk_latents, medium, dk_latents.stride(0), head);
    group.segments[1].dv = at(dv_latents, medium, dv_latents.stride(0), head);
    group.segments[1].d_stride = dk_latents.stride(1);
    return group;
  };
  run_tasks(
      media * heads, [&](int64_t i) { return backward_scratch_bytes(group_of(i)); },
      [&](int64_t i, void* scratch) { kernels().backward[storage](group_of(i), scratch); });
  return std::make_tuple(dq, dk_features, dv_features, dk_latents, dv_latents);
}

STABLE_TORCH_LIBRARY_IMPL(flamingo, CPU, m) {
  m.impl("resampler_attention", TORCH_BOX(&resampler_attention));
  m.impl("resampler_attention_backward", TORCH_BOX(&resampler_attention_backward));
}

}  // namespace cpu
}  // namespace flamingo
