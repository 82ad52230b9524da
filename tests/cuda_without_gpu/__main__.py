"""Print what the micro-steps, generation and evaluation do on the fake accelerator."""

from tests.cuda_without_gpu.cases import run_all

for name, watch in run_all().items():
    counts = f"{watch.kernels.total():6d} kernels {watch.hooked:4d} hooked modules {len(watch.waits):3d} waits"
    print(f"{name:60s} {counts}  {watch.failure or ''}")
    for wait in watch.waits:
        print(f"    {wait}")
