"""Run every CUDA kernel on small inputs, for ``compute-sanitizer --tool TOOL python -m tests.gpu.sanitize``."""

from __future__ import annotations

import torch

from model import ops
from tests.ops.cases import PACKED, cross_case, resampler_case, run_cross, run_resampler


def main() -> None:
    """Run forward and backward of both ops on every path through them."""
    for head_dim in (64, 96, 128):
        for num_latents, so_far, num_kv_heads in ((64, False, 2), (64, True, 2), (70, False, 2), (64, False, 1)):
            options = {"num_latents": num_latents, "head_dim": head_dim, "so_far": so_far, "dtype": torch.bfloat16}
            case = cross_case(PACKED, num_media=8, num_kv_heads=num_kv_heads, device="cuda", **options)
            run_cross(ops.masked_cross_attention, case, backend="fused")
        for num_latents in (64, 70):
            media = resampler_case(
                [130, 0, 63], num_latents=num_latents, head_dim=head_dim, dtype=torch.bfloat16, device="cuda"
            )
            run_resampler(ops.resampler_attention, media, backend="fused")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
