"""Imported once by the fork server of ``processes``, so that the ranks need not import it."""

import deepspeed.runtime.zero.stage3  # noqa: F401
