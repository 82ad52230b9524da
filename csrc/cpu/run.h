// From tensors to tasks: pointers of one head, scratch memory, and the threads of torch.
#pragma once
#include <atomic>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "../include/tensors.h"
#include "attention_kernel.h"

namespace flamingo {
namespace cpu {

inline Storage storage_of(const Tensor& x) {
  const bool float32 = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(float32 || x.scalar_type() == ScalarType::BFloat16, "q must be float32 or bfloat16 on the CPU");
  STD_TORCH_CHECK(x.size(x.dim() - 1) % 16 == 0, "the head width must be a multiple of 16 on the CPU");
  return float32 ? Storage::kFloat32 : Storage::kBFloat16;
}

// Address of x[first, ..., head, 0] where the strides of the leading dimensions are `stride` elements.
inline char* at(const Tensor& x, int64_t first, int64_t stride, int64_t head) {
  const int64_t elements = first * stride + head * x.stride(x.dim() - 2);
  return static_cast<char*>(x.data_ptr()) + elements * (x.scalar_type() == ScalarType::Float ? 4 : 2);
}

// An index tensor of either width as int64.
inline std::vector<int64_t> values_of(const Tensor& index) {
  const int64_t count = index.numel();
  std::vector<int64_t> values(count);
  if (index.scalar_type() == ScalarType::Long) {
    const int64_t* p = static_cast<const int64_t*>(index.data_ptr());
    values.assign(p, p + count);
  } else {
    const int32_t* p = static_cast<const int32_t*>(index.data_ptr());
    values.assign(p, p + count);
  }
  return values;
}

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};

// Runs task(i, scratch) for every i on torch's threads. Tasks differ in size, so a thread takes the next one when it
// is done; each writes its own outputs, so the result does not depend on who does what. A thread's scratch memory
// is as large as the largest task it has met.
inline void run_tasks(int64_t count, const std::function<int64_t(int64_t)>& scratch_bytes,
                      const std::function<void(int64_t, void*)>& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      std::unique_ptr<void, FreeDeleter> scratch;
      int64_t capacity = 0;
      for (int64_t i = next++; i < count; i = next++) {
        const int64_t needed = scratch_bytes(i);
        if (needed > capacity) {
          scratch.reset(std::aligned_alloc(64, (needed + 63) / 64 * 64));
          STD_TORCH_CHECK(scratch, "out of memory: ", needed, " bytes of scratch memory");
          capacity = needed;
        }
        task(i, scratch.get());
      }
    }
  });
}

}  // namespace cpu
}  // namespace flamingo
