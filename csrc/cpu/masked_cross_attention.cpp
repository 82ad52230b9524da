// Implements flamingo::masked_cross_attention on the CPU.
//
// Media that some row sees together form a component. Its keys are the latents of those media, and its rows are all
// rows that see any of them. A task is one component and one head of the keys, with all heads of the queries that share
// it. Components share neither rows nor keys, so no gradient is written twice. Where each row sees one medium, every
// medium is a component.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "run.h"

namespace flamingo {
namespace cpu {
namespace {

struct Component {
  int64_t first_medium, media;
  int64_t first_row, rows;  // in Plan::rows
};

struct Plan {
  std::vector<Component> components;
  std::vector<int64_t> rows;  // the rows that see a medium, by the last medium they see
  std::vector<int64_t> key_begin, key_end;  // of each of them, within its component; empty: all keys
  std::vector<int64_t> blind_rows;          // the rows that see none
};

void check_values(const std::vector<int64_t>& last, const std::vector<int64_t>& first, int64_t media) {
  for (size_t t = 0; t < last.size(); ++t) {
    STD_TORCH_CHECK(last[t] >= -1 && last[t] < media, "media_index[", t, "] is ", last[t], ", expected -1 to ",
                          media - 1);
    STD_TORCH_CHECK(first.empty() || last[t] < 0 || (first[t] >= 0 && first[t] <= last[t]), "first_media[", t,
                          "] is ", first[t], ", expected 0 to media_index[", t, "] = ", last[t]);
  }
}

Plan make_plan(const Tensor& media_index, const std::optional<Tensor>& first_media, int64_t media, int64_t latents) {
  const std::vector<int64_t> last = values_of(media_index);
  const std::vector<int64_t> first = first_media.has_value() ? values_of(*first_media) : std::vector<int64_t>();
  check_values(last, first, media);

  // links[m] > 0: some row sees media m and m + 1 together.
  std::vector<int64_t> links(media + 1, 0), count(media + 1, 0);
  for (size_t t = 0; t < last.size(); ++t) {
    if (last[t] < 0) continue;
    ++count[last[t] + 1];
    if (first.empty()) continue;
    ++links[first[t]];
    --links[last[t]];
  }
  std::partial_sum(links.begin(), links.end(), links.begin());
  std::partial_sum(count.begin(), count.end(), count.begin());

  Plan plan;
  std::vector<int64_t> origin(media);  // the first medium of the component of a medium
  for (int64_t m = 0; m < media; ++m) {
    if (m == 0 || links[m - 1] == 0) plan.components.push_back({m, 0, count[m], 0});
    Component& component = plan.components.back();
    ++component.media;
    component.rows = count[m + 1] - component.first_row;
    origin[m] = component.first_medium;
  }
  plan.rows.resize(count[media]);
  for (size_t t = 0; t < last.size(); ++t) {
    if (last[t] < 0) plan.blind_rows.push_back(t);
    else plan.rows[count[last[t]]++] = t;
  }
  if (first.empty()) return plan;
  for (const int64_t t : plan.rows) {
    plan.key_begin.push_back((first[t] - origin[last[t]]) * latents);
    plan.key_end.push_back((last[t] - origin[last[t]] + 1) * latents);
  }
  return plan;
}

// Fills all fields of a group except the outputs.
Group make_group(const Plan& plan, const Component& component, const Tensor& q, const Tensor& k, const Tensor& v,
                 int64_t key_head, float scale, float out_scale) {
  Group group = {};
  group.rows = plan.rows.data() + component.first_row;
  group.row_count = component.rows;
  group.heads = q.size(1) / k.size(2);
  group.q = at(q, 0, 0, key_head * group.heads);
  group.q_stride = q.stride(0);
  group.q_head = q.stride(1);
  if (!plan.key_begin.empty()) {
    group.key_begin = plan.key_begin.data() + component.first_row;
    group.key_end = plan.key_end.data() + component.first_row;
  }
  group.segment_count = 1;
  KeySegment& keys = group.segments[0];
  keys.k = at(k, component.first_medium, k.stride(0), key_head);
  keys.v = at(v, component.first_medium, v.stride(0), key_head);
  keys.k_stride = k.stride(1);
  keys.v_stride = v.stride(1);
  keys.count = component.media * k.size(1);
  group.width = q.size(2);
  group.scale = scale;
  group.out_scale = out_scale;
  return group;
}

// Latents of consecutive media must be at one stride, as in a contiguous tensor and in a slice of a fused one.
Tensor with_uniform_rows(const Tensor& x) {
  return x.stride(0) == x.size(1) * x.stride(1) ? x : torch::stable::contiguous(x);
}

float value_of(const std::optional<Tensor>& out_scale) {
  return out_scale.has_value() ? *static_cast<const float*>(out_scale->data_ptr()) : 1.0f;
}

void clear_rows(const Tensor& x, const std::vector<int64_t>& rows) {
  const int64_t bytes = x.size(1) * x.size(2) * (x.scalar_type() == ScalarType::Float ? 4 : 2);
  for (const int64_t row : rows) std::fill_n(static_cast<char*>(x.data_ptr()) + row * bytes, bytes, 0);
}

Tensor empty_contiguous(const Tensor& like) { return torch::stable::new_empty(like, like.sizes()); }

}  // namespace

// The backward of the CUDA kernels needs the ranges. The CPU kernels group the rows themselves.
Tensor media_token_ranges(const Tensor& media_index, const std::optional<Tensor>& first_media, int64_t media) {
  check_media_token_ranges(media_index, first_media, media);
  const std::vector<int64_t> last = values_of(media_index);
  const std::vector<int64_t> first = first_media.has_value() ? values_of(*first_media) : std::vector<int64_t>();
  check_values(last, first, media);
  const Tensor ranges = torch::stable::new_empty(media_index, {2, media}, ScalarType::Int);
  int32_t* begin = static_cast<int32_t*>(ranges.data_ptr());
  int32_t* end = begin + media;
  std::fill_n(begin, media, static_cast<int32_t>(last.size()));
  std::fill_n(end, media, 0);
  for (size_t t = 0; t < last.size(); ++t) {
    for (int64_t m = first.empty() ? last[t] : first[t]; last[t] >= 0 && m <= last[t]; ++m) {
      begin[m] = std::min(begin[m], static_cast<int32_t>(t));
      end[m] = static_cast<int32_t>(t) + 1;
    }
  }
  return ranges;
}

Tensor masked_cross_attention(const Tensor& q, const Tensor& k_any, const Tensor& v_any, const Tensor& media_index,
                              const std::optional<Tensor>& first_media, const std::optional<Tensor>& out_scale,
                              double scale, const std::optional<Tensor>& token_ranges) {
  check_masked_cross_attention(q, k_any, v_any, media_index, first_media, out_scale);
  check_token_ranges(token_ranges, k_any.size(0), q);
  const Tensor k = with_uniform_rows(k_any), v = with_uniform_rows(v_any);
  const int storage = static_cast<int>(storage_of(q));
  const Plan plan = make_plan(media_index, first_media, k.size(0), k.size(1));
  const int64_t key_heads = k.size(2);
  const float factor = value_of(out_scale);
  Tensor out = empty_contiguous(q);
  clear_rows(out, plan.blind_rows);

  const auto group_of = [&](int64_t i) {
    const int64_t key_head = i % key_heads;
    Group group = make_group(plan, plan.components[i / key_heads], q, k, v, key_head, static_cast<float>(scale), factor);
    group.out = at(out, 0, 0, key_head * group.heads);
    group.out_stride = out.stride(0);
    group.out_head = out.stride(1);
    return group;
  };
  run_tasks(
      plan.components.size() * key_heads, [&](int64_t i) { return forward_scratch_bytes(group_of(i)); },
      [&](int64_t i, void* scratch) { kernels().forward[storage](group_of(i), scratch); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_cross_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k_any, const Tensor& v_any, const Tensor& media_index,
    const std::optional<Tensor>& first_media, const std::optional<Tensor>& out_scale, double scale,
    const std::optional<Tensor>& token_ranges) {
  check_masked_cross_attention(q, k_any, v_any, media_index, first_media, out_scale);
  check_token_ranges(token_ranges, k_any.size(0), q);
  check_heads(grad, "grad", 3, q);
  check_same_shape(grad, "grad", q, "q");
  const Tensor k = with_uniform_rows(k_any), v = with_uniform_rows(v_any);
  const int storage = static_cast<int>(storage_of(q));
  const Plan plan = make_plan(media_index, first_media, k.size(0), k.size(1));
  const int64_t key_heads = k.size(2), tasks = plan.components.size() * key_heads;
  const float factor = value_of(out_scale);
  Tensor dq = empty_contiguous(q), dk = empty_contiguous(k), dv = empty_contiguous(v);
  clear_rows(dq, plan.blind_rows);

  const auto group_of = [&](int64_t i) {
    const Component& component = plan.components[i / key_heads];
    const int64_t key_head = i % key_heads;
    Group group = make_group(plan, component, q, k, v, key_head, static_cast<float>(scale), factor);
    group.grad = at(grad, 0, 0, key_head * group.heads);
    group.grad_stride = grad.stride(0);
    group.grad_head = grad.stride(1);
    group.out = at(dq, 0, 0, key_head * group.heads);
    group.out_stride = dq.stride(0);
    group.out_head = dq.stride(1);
    group.segments[0].dk = at(dk, component.first_medium, dk.stride(0), key_head);
    group.segments[0].dv = at(dv, component.first_medium, dv.stride(0), key_head);
    group.segments[0].d_stride = dk.stride(1);
    return group;
  };
  std::vector<double> partial(tasks);
  run_tasks(
      tasks, [&](int64_t i) { return backward_scratch_bytes(group_of(i)); },
      [&](int64_t i, void* scratch) { partial[i] = kernels().backward[storage](group_of(i), scratch); });

  Tensor d_out_scale = torch::stable::new_empty(q, {1}, ScalarType::Float);
  *static_cast<float*>(d_out_scale.data_ptr()) =
      static_cast<float>(std::accumulate(partial.begin(), partial.end(), 0.0));
  return std::make_tuple(dq, dk, dv, d_out_scale);
}

STABLE_TORCH_LIBRARY_IMPL(flamingo, CPU, m) {
  m.impl("media_token_ranges", TORCH_BOX(&media_token_ranges));
  m.impl("masked_cross_attention", TORCH_BOX(&masked_cross_attention));
  m.impl("masked_cross_attention_backward", TORCH_BOX(&masked_cross_attention_backward));
}

}  // namespace cpu
}  // namespace flamingo
