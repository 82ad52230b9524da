// Defines the CPU library: the schemas of all ops (the CUDA library only adds implementations) and test functions.
#include "../include/tensors.h"
#include "attention_kernel.h"
#include "run.h"

namespace flamingo {

// Returns the instruction set in use, after setting it to the Isa `level` unless that is -1. Tests need it.
int64_t cpu_isa(int64_t level) {
  if (level >= 0) {
    STD_TORCH_CHECK(level <= static_cast<int64_t>(cpu::best_isa()), "this processor does not run instruction set ",
                    level);
    cpu::select_isa(static_cast<cpu::Isa>(level));
  }
  return static_cast<int64_t>(cpu::selected_isa());
}

// Frees the scratch memory that the calling thread keeps between calls, and returns its size. Measurements need it.
int64_t release_cpu_scratch() { return cpu::scratch_of_this_thread().release(); }

STABLE_TORCH_LIBRARY(flamingo, m) {
  m.def(
      "masked_cross_attention(Tensor q, Tensor k, Tensor v, Tensor media_index, Tensor? first_media, "
      "Tensor? out_scale, float scale, Tensor? token_ranges=None) -> Tensor");
  m.def(
      "masked_cross_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor media_index, "
      "Tensor? first_media, Tensor? out_scale, float scale, Tensor? token_ranges=None) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("media_token_ranges(Tensor media_index, Tensor? first_media, int media) -> Tensor");
  m.def(
      "resampler_attention(Tensor q, Tensor k_features, Tensor v_features, Tensor k_latents, Tensor v_latents, "
      "Tensor cu_media, float scale) -> (Tensor, Tensor)");
  m.def(
      "resampler_attention_backward(Tensor grad, Tensor out, Tensor lse, Tensor q, Tensor k_features, "
      "Tensor v_features, Tensor k_latents, Tensor v_latents, Tensor cu_media, float scale) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_isa(int level) -> int");
  m.def("release_cpu_scratch() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(flamingo, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("release_cpu_scratch", TORCH_BOX(&release_cpu_scratch));
}

}  // namespace flamingo
