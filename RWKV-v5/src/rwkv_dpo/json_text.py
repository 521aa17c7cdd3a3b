"""JSON as every reader of it takes it: Python's own writer spells NaN and infinities, which JSON doesn't know."""

import json
import math
from typing import Any


def as_json(value: Any, **options: Any) -> str:
    """The value as json.dumps writes it with these options, numbers that are not finite as null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
