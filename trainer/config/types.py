"""Numbers within bounds, which pydantic checks, and what every class of settings has."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

FORBID_UNKNOWN_KEYS = {"extra": "forbid"}

Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
