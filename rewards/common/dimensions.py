"""Which of a model's several scores count: one by name, all by a name for the whole, or any of them with weights."""

import math
from collections.abc import Iterable, Sequence

from rewards.contract import RewardError


def dimension_weights(
    name: str, dimension: str | dict[str, float], known: Sequence[str], whole: str, each: float
) -> list[float]:
    """The weight of each dimension in `known`; `whole` names the sum of all, each times `each`. Raises RewardError."""
    chosen = {dimension: 1.0} if isinstance(dimension, str) else dimension
    if chosen == {whole: 1.0}:
        return [each] * len(known)
    if not isinstance(chosen, dict) or not chosen or set(chosen) - set(known) or not _are_weights(chosen.values()):
        expected = f"one of {', '.join(known)} or {whole}, or a weight for some of them, such as {{{known[0]}: 2}}"
        raise RewardError(name, got=f"dimension={dimension!r}", expected=expected, cure="correct dimension")
    return [float(chosen.get(one, 0.0)) for one in known]


def _are_weights(values: Iterable) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)
