// Turns tensors into tasks: pointers of one head, scratch memory, and the threads of torch.
#pragma once
#include <atomic>
#include <cstdlib>
#include <functional>
#include <utility>
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

// Returns the address of x[first, ..., head, 0] where the strides of the leading dimensions are `stride` elements.
inline char* at(const Tensor& x, int64_t first, int64_t stride, int64_t head) {
  const int64_t elements = first * stride + head * x.stride(x.dim() - 2);
  return static_cast<char*>(x.data_ptr()) + elements * (x.scalar_type() == ScalarType::Float ? 4 : 2);
}

// Returns an int32 or int64 index tensor as int64.
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

// Scratch memory of one thread. The thread keeps up to kKept bytes for its next task and its next call, because fresh
// memory costs a page fault for every 4 KiB.
class Scratch {
 public:
  ~Scratch() { std::free(memory_); }

  void* at_least(int64_t bytes) {
    if (bytes > capacity_) {
      std::free(memory_);
      memory_ = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
      capacity_ = memory_ ? bytes : 0;
      STD_TORCH_CHECK(memory_, "out of memory: ", bytes, " bytes of scratch memory");
    }
    return memory_;
  }

  void trim() {
    if (capacity_ > kKept) release();
  }

  // Returns the number of bytes.
  int64_t release() {
    std::free(memory_);
    memory_ = nullptr;
    return std::exchange(capacity_, 0);
  }

 private:
  static constexpr int64_t kKept = 4 << 20;
  void* memory_ = nullptr;
  int64_t capacity_ = 0;
};

inline Scratch& scratch_of_this_thread() {
  static thread_local Scratch scratch;
  return scratch;
}

// Runs task(i, scratch) for every i on torch's threads. Tasks differ in size, so a thread takes the next one when it
// is done. Each task writes its own outputs, so the result does not depend on the assignment to threads.
inline void run_tasks(int64_t count, const std::function<int64_t(int64_t)>& scratch_bytes,
                      const std::function<void(int64_t, void*)>& task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    Scratch& scratch = scratch_of_this_thread();
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < count; i = next++) task(i, scratch.at_least(scratch_bytes(i)));
    scratch.trim();
  });
}

}  // namespace cpu
}  // namespace flamingo
