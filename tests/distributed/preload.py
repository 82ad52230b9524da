"""Imported once by the fork server of ``processes``: everything that a rank would import anyway."""

import deepspeed.runtime.zero.stage3  # noqa: F401
