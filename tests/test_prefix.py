"""Cheaper prefixes: each does what it says, leaves the window's gradient alone, and its error falls as it should."""

import pytest
import torch
from tiny import tiny_conditioning, tiny_transformer

from rlhf.contentv.flow import euler_step, guided_velocity
from rlhf.prefix import KeptGuidance, PrefixBuffer, by_gradient, fewer_steps

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.6, 0.4, 0.2, 0.0], dtype=torch.float64)


def rollout(velocity, x, sigmas, window=None):
    window = len(sigmas) - 1 if window is None else window
    for i in range(len(sigmas) - 1):
        with torch.set_grad_enabled(i >= window):
            x = euler_step(x, velocity(x, sigmas[i]), sigmas[i], sigmas[i + 1])
    return x


@pytest.mark.parametrize(
    ("window", "steps", "expected"),
    [(4, 2, [0, 2, 4, 5, 6]), (5, 5, range(7)), (3, 1, [0, 3, 4, 5, 6]), (5, 3, [0, 2, 3, 5, 6])],
)
def test_fewer_steps_keep_the_window(window, steps, expected):
    assert torch.equal(fewer_steps(SIGMAS, window, steps), SIGMAS[list(expected)])


@pytest.mark.parametrize("steps", [0, 5])
def test_fewer_steps_are_checked(steps):
    with pytest.raises(ValueError, match=f"prefix_steps={steps}, expected 1 to 4"):
        fewer_steps(SIGMAS, 4, steps)


class Guided:
    def __init__(self):
        self.model, self.cond, self.text = tiny_transformer().double(), tiny_conditioning(dtype=torch.float64), []
        self.model.register_forward_pre_hook(
            lambda _, args: self.text.append(torch.equal(args[1], self.cond.prompt_embeds_BLD))
        )
        self.noise = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def exact(self, x, sigma):
        return guided_velocity(self.model, x, sigma, self.cond, 3.0)


def test_the_negative_branch_runs_once_in_so_many_steps_and_always_in_the_window():
    guided = Guided()
    rollout(KeptGuidance(guided.model, guided.cond, 3.0, every=3), guided.noise, SIGMAS, window=5)
    both, text_alone = [True, False], [True]
    assert guided.text == both + text_alone * 2 + both + text_alone + both


def test_no_guidance_runs_no_negative_branch():
    guided = Guided()
    with torch.no_grad():
        kept = KeptGuidance(guided.model, guided.cond, 0.5, every=2)(guided.noise, SIGMAS[0])
        assert torch.equal(kept, guided_velocity(guided.model, guided.noise, SIGMAS[0], guided.cond, 1.0))
    assert guided.text == [True, True]


def test_guidance_kept_for_one_step_is_exact_and_for_more_is_not():
    guided = Guided()
    with torch.no_grad():
        exact = rollout(guided.exact, guided.noise, SIGMAS)
        once = rollout(KeptGuidance(guided.model, guided.cond, 3.0, every=1), guided.noise, SIGMAS)
        kept = rollout(KeptGuidance(guided.model, guided.cond, 3.0, every=2), guided.noise, SIGMAS)
        none = rollout(lambda x, s: guided_velocity(guided.model, x, s, guided.cond, 1.0), guided.noise, SIGMAS)
    torch.testing.assert_close(once, exact, rtol=1e-9, atol=1e-9)
    assert 1e-4 * (none - exact).norm() < (kept - exact).norm() < 0.5 * (none - exact).norm()


def test_the_velocity_is_chosen_by_whether_a_gradient_is_recorded():
    velocity = by_gradient(lambda x, s: "window", lambda x, s: "prefix")
    assert velocity(None, None) == "window"
    with torch.no_grad():
        assert velocity(None, None) == "prefix"


def test_a_start_is_made_once_and_used_as_often_as_asked():
    buffer, made = PrefixBuffer(3), []
    for step in range(7):
        for micro in range(2):
            rollout = buffer.rollout_of(step, micro)
            start = buffer.start(step, micro, lambda key=(rollout, micro, step): made.append(key) or torch.tensor(key))
            assert start[0] == rollout
            assert step - start[2] <= 2, "staleness is bounded"
    assert made == [(0, 0, 0), (0, 1, 0), (1, 1, 2), (1, 0, 3), (2, 1, 5), (2, 0, 6)]
    assert len(buffer.starts) == 2, "one for each batch of a step"
    assert [buffer.rollout_of(0, micro) for micro in range(5)] == [0] * 5, "none is left out"


def test_one_use_keeps_nothing():
    buffer = PrefixBuffer(1)
    assert [buffer.rollout_of(step, 0) for step in range(3)] == [0, 1, 2]
    buffer.start(0, 0, lambda: torch.zeros(1))
    assert buffer.starts == {}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixBuffer(0), "rollout_reuse=0, expected at least 1"),
        (lambda: KeptGuidance(None, tiny_conditioning(), 3.0, 0), "guidance_every=0, expected at least 1"),
    ],
)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
