"""``trainer.train`` that gathers each frozen block together on a CPU too, as it does on a GPU and from a drive."""

from __future__ import annotations

import sys
from typing import Any

import deepspeed

from trainer import train
from trainer.deepspeed_engine.frozen_blocks import gather_frozen_blocks_together

_initialize = deepspeed.initialize


def _initialize_whole_blocks(model: Any, **settings: Any) -> Any:
    gather_frozen_blocks_together(model)
    return _initialize(model=model, **settings)


if __name__ == "__main__":
    deepspeed.initialize = _initialize_whole_blocks
    sys.exit(train.main())
