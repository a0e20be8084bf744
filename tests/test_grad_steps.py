"""The choice of gradient steps is a pure function with few promises, all of them checked for every size."""

import pytest

from rlhf.grad_steps import choose_grad_steps


@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
def test_steps_are_sorted_unique_in_range_and_as_many_as_asked(num_steps):
    for num_grad in range(1, num_steps + 1):
        steps = choose_grad_steps("last", num_steps, num_grad)
        assert steps == sorted(set(steps))
        assert len(steps) == num_grad
        assert steps[0] >= 0
        assert steps[-1] == num_steps - 1, "the last step is always among the last K"


@pytest.mark.parametrize("num_grad", [0, -1, 11])
def test_impossible_counts_are_refused(num_grad):
    with pytest.raises(ValueError, match=f"num_grad_steps={num_grad}, expected 1 to num_inference_steps=10"):
        choose_grad_steps("last", 10, num_grad)


def test_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match="expected one of last, random_last"):
        choose_grad_steps("first", 10, 1)
