"""The choice of gradient steps is a pure function, whose promises are checked for every size."""

import pytest

from rlhf.device import generator
from rlhf.method.grad_steps import choose_grad_steps, listed_grad_steps


@pytest.mark.parametrize("strategy", ["last", "random_last", "uniform"])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
def test_steps_are_sorted_unique_in_range_and_as_many_as_asked(strategy, num_steps):
    for num_grad in range(1, num_steps + 1):
        steps = choose_grad_steps(strategy, num_steps, num_grad, generator("steps", num_grad))
        assert steps == sorted(set(steps))
        assert 0 <= steps[0] <= steps[-1] < num_steps
        assert 1 <= len(steps) <= num_grad
        if strategy != "random_last":
            assert len(steps) == num_grad
        if strategy != "uniform":
            assert steps[-1] == num_steps - 1, "the last step is always among the last K"


@pytest.mark.parametrize(("num_steps", "num_grad"), [(10, 3), (10, 5), (4, 1), (7, 4)])
def test_uniform_steps_are_evenly_apart_and_reach_every_step(num_steps, num_grad):
    reached = set()
    for draw in range(200):
        steps = choose_grad_steps("uniform", num_steps, num_grad, generator("steps", draw))
        assert {b - a for a, b in zip(steps, steps[1:], strict=False)} <= {num_steps // num_grad}
        reached |= set(steps)
    assert reached == set(range(num_steps))


def test_listed_steps_are_taken_as_they_are_or_refused():
    assert listed_grad_steps([4, 0, 2], 5) == [0, 2, 4]
    for wrong in (None, [], [5], [-1], [1, 1]):
        with pytest.raises(ValueError, match="expected different steps of 0 to 4"):
            listed_grad_steps(wrong, 5)


@pytest.mark.parametrize("num_grad", [0, -1, 11])
def test_impossible_counts_are_refused(num_grad):
    with pytest.raises(ValueError, match=f"num_grad_steps={num_grad}, expected 1 to num_inference_steps=10"):
        choose_grad_steps("last", 10, num_grad)
