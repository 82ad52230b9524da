// Declares one CPU task: the attention of a group of query rows to a list of keys, for one head of the keys.
//
// Both ops reduce to it. In masked cross-attention a group is the rows that see a run of media, and its keys are the
// latents of the run; each row has its own range of keys. In resampler attention a group is the latent queries of a
// medium, and its keys are the features and latents of the medium.
//
// Files compiled for different instruction sets include this header, so it holds only plain structs and functions.
// The linker could keep the AVX-512 copy of an inline function of the standard library for every processor.
#pragma once
#include <stdint.h>

namespace flamingo {
namespace cpu {

constexpr int64_t kBlockKeys = 64;  // keys of one block; scores are stored block by block
constexpr int64_t kTileRows = 64;   // query rows computed together
// Blocks added up one after the other. The sums of so many blocks are added up apart, so that rounding errors grow little
// with the number of keys.
constexpr int64_t kSummedBlocks = 16;

enum class Storage : int { kFloat32 = 0, kBFloat16 = 1 };
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// Keys at one stride in memory. Strides are in elements; the gradient of a key is contiguous.
struct KeySegment {
  const void* k;
  const void* v;
  int64_t k_stride;
  int64_t v_stride;
  int64_t count;
  void* dk;
  void* dv;
  int64_t d_stride;
};

struct Group {
  // Row r of the group is row rows[r] (or r, if rows is null) of the query, gradient and output matrices.
  const int64_t* rows;
  int64_t row_count;
  int64_t heads;  // heads of the queries that share the keys, at the strides q_head, grad_head and out_head
  const void* q;
  int64_t q_stride, q_head;
  const void* grad;  // gradient of the output; backward only
  int64_t grad_stride, grad_head;
  void* out;  // output (forward) or gradient of the queries (backward)
  int64_t out_stride, out_head;
  float* lse;  // log of the sum of the exponentials of a row; may be null; forward only
  int64_t lse_stride;

  // Row r sees the keys key_begin[r] <= key < key_end[r]; null: all keys.
  const int64_t* key_begin;
  const int64_t* key_end;
  KeySegment segments[2];
  int segment_count;

  int64_t width;    // head width, a multiple of 16
  float scale;      // of the scores
  float out_scale;  // of the output: tanh(gate), or 1

  int64_t key_count() const { return segments[0].count + (segment_count > 1 ? segments[1].count : 0); }
  int64_t block_count() const { return (key_count() + kBlockKeys - 1) / kBlockKeys; }
};

// Return the bytes of scratch memory, aligned to 64, that a task needs: upper bounds for every kernel set.
int64_t forward_scratch_bytes(const Group& group);
int64_t backward_scratch_bytes(const Group& group);

// The functions compiled for one instruction set, indexed by Storage.
struct KernelSet {
  const char* name;
  void (*forward[2])(const Group&, void* scratch);
  // Returns the gradient of out_scale: the sum of (output before out_scale) * (gradient of the output).
  double (*backward[2])(const Group&, void* scratch);
};

extern const KernelSet kGenericKernels;
#if defined(FLAMINGO_X86_KERNELS)
extern const KernelSet kAvx2Kernels;
extern const KernelSet kAvx512Kernels;
extern const KernelSet kAvx512Bf16Kernels;
#endif

// Returns the fastest set that this processor runs, or the one that a test selected.
const KernelSet& kernels();
Isa best_isa();
Isa selected_isa();
void select_isa(Isa isa);

}  // namespace cpu
}  // namespace flamingo
