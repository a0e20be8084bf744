"""Weights of a model's several scores."""

import pytest

from rewards import RewardError
from rewards.common.heads import dimension_weights

KNOWN = ("quality", "motion", "text")


@pytest.mark.parametrize(
    ("dimension", "weights"),
    [
        ("motion", [0, 1, 0]),
        ("overall", [0.5, 0.5, 0.5]),
        ({"text": 2}, [0, 0, 2]),
        ({"text": 2, "quality": -0.5}, [-0.5, 0, 2]),
    ],
)
def test_weights(dimension, weights):
    assert dimension_weights("test", dimension, KNOWN, "overall", 0.5) == weights


@pytest.mark.parametrize(
    "dimension",
    [
        "visual",
        {},
        {"overall": 2},
        {"motion": 1, "more": 1},
        ["motion", "text"],
        None,
        {"motion": "much"},
        {"motion": float("nan")},
    ],
)
def test_what_is_refused(dimension):
    with pytest.raises(RewardError, match="expected one of quality, motion, text or overall, or a weight for some"):
        dimension_weights("test", dimension, KNOWN, "overall", 1.0)
