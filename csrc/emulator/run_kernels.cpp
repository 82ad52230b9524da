// Launches both ops on the emulator, by C functions for tests/ops/emulator.py.
#include "../cuda/launch.cuh"

using namespace flamingo;
using namespace flamingo::cuda;

namespace {

char failure_text[512];

// Returns 0, or 1 with the reason in failure_text.
template <class Launch>
int guarded(Launch launch) {
  try {
    return launch();
  } catch (const simt::Failure& failure) {
    std::snprintf(failure_text, sizeof(failure_text), "%s", failure.reason.c_str());
    return 1;
  }
}

template <template <Type, int> class Launches, class Params>
int dispatch(int type, int width, int backward, const Params& p) {
#define FLAMINGO_CASE(T, W)                                    \
  if (type == static_cast<int>(Type::T) && width == W)         \
    return guarded([&] { return backward ? Launches<Type::T, W>::backward(p, nullptr) : Launches<Type::T, W>::forward(p, nullptr); });
#if defined(FLAMINGO_EMULATE_ONE)
  FLAMINGO_CASE(kBFloat16, FLAMINGO_EMULATE_ONE)
#else
  FLAMINGO_CASE(kBFloat16, 64)
  FLAMINGO_CASE(kBFloat16, 96)
  FLAMINGO_CASE(kBFloat16, 128)
  FLAMINGO_CASE(kFloat16, 64)
  FLAMINGO_CASE(kFloat16, 128)
#endif
#undef FLAMINGO_CASE
  std::snprintf(failure_text, sizeof(failure_text), "not compiled for this type and width");
  return 1;
}

}  // namespace

extern "C" {

void emulator_configure(uint64_t seed, int copies, int skipped_site) {
  simt::machine.random_state = seed * 2654435761u + 1;
  simt::machine.copies = static_cast<simt::Copies>(copies);
  simt::machine.skipped_site = skipped_site;
}

const char* emulator_failure() { return failure_text; }
int emulator_site_count() { return static_cast<int>(simt::machine.sites.size()); }
const char* emulator_site_kind(int site) { return simt::machine.sites[site].kind; }
const char* emulator_site_file(int site) { return simt::machine.sites[site].file.c_str(); }
int emulator_site_line(int site) { return simt::machine.sites[site].line; }

int emulate_cross_attention(int type, int width, int backward, const CrossAttentionParams* p) {
  return dispatch<CrossLaunches>(type, width, backward, *p);
}
int emulate_row_ranges(const CrossAttentionParams* p) {
  return guarded([&] { return launch_row_ranges(*p, nullptr); });
}
int emulate_resampler(int type, int width, int backward, const ResamplerParams* p) {
  return dispatch<ResamplerLaunches>(type, width, backward, *p);
}
int emulator_cross_splits(const CrossAttentionParams* p) { return wanted_splits(*p); }
int emulator_resampler_splits(const ResamplerParams* p) { return wanted_splits(*p); }
int emulator_params_bytes(int resampler) {
  return resampler ? sizeof(ResamplerParams) : sizeof(CrossAttentionParams);
}

}  // extern "C"
