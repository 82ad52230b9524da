"""``python -m trainer.benchmark data``: measure the stream of data against open_clip, webdataset and fixed limits.

Times are processor time, so that other processes matter less. Baselines take turns with the trainer's own code on the
same bytes. A fixed limit is a baseline named "limit".
"""

from __future__ import annotations

import torch

from trainer.benchmark.data_hand_over import hand_over_rows
from trainer.benchmark.data_reading import decoding_rows, iteration_rows
from trainer.benchmark.data_scale import scale_rows
from trainer.benchmark.result_file import Measurement


def run(device: str, repeats: int = 5) -> list[Measurement]:
    """Return all measurements. They all use the CPU, whatever ``device`` is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [*decoding_rows(repeats), *iteration_rows(repeats), *hand_over_rows(repeats), *scale_rows()]
    finally:
        torch.set_num_threads(threads)
