"""Define number types with bounds, which pydantic checks, and the pydantic setting of every settings class."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Gt, Le

# As __pydantic_config__ of a dataclass, it makes a misspelled key an error.
FORBID_UNKNOWN_KEYS = {"extra": "forbid"}

Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Probability = Annotated[float, Ge(0), Le(1)]
PositiveShare = Annotated[float, Gt(0), Le(1)]
