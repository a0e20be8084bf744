"""The study's baselines as numbers: stochastic sampling, policy gradient, best of n."""

import baselines
import pytest
import torch
from baselines import Policy, PolicyGradientTrainer, Trajectory
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.device import generator
from rlhf.method.flow_grpo import MOMENTS, FlowGRPO, cps_moments
from rlhf.method.nft import advantages
from rlhf.method.regression import ScoredRollout

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)  # nano's


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------- policy gradient


def linear(theta):
    """v = a x + b, the same at every level."""
    return lambda x, sigma: theta[0] * x + theta[1]


@pytest.mark.parametrize("kind", MOMENTS)
def test_the_first_update_of_a_rollout_is_that_of_the_method(kind):
    policy, theta = Policy(noise=kind, group_size=4, kl_weight=0.3), torch.tensor([0.3, -0.4], dtype=torch.float64)
    base = linear(torch.tensor([0.1, 0.0], dtype=torch.float64))
    noise = lambda purpose: torch.randn(8, 1, generator=generator(purpose), dtype=torch.float64)
    path = baselines.stochastic_rollout(linear(theta), noise, SIGMAS, policy)
    scores, trained = path.states[-1][:, 0], theta.clone().requires_grad_()
    of_update = baselines.step_losses(linear(trained), base, path, advantages(scores, 4), SIGMAS, policy)
    method = FlowGRPO(4, kind, policy.noise_level, policy.kl_weight, baselines.MAX_ADVANTAGE)
    base_vjp = lambda x, sigma, a: (base(x, sigma), None)
    rollout = ScoredRollout(path.states, SIGMAS, scores, None, noise, linear(trained), None, base_vjp)
    of_method = (loss_B.mean() for loss_B in method.losses(rollout))
    gradients = [torch.autograd.grad(sum(losses), trained)[0] for losses in (of_update, of_method)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=0)


def test_the_clipped_surrogate_has_the_gradient_of_finite_differences():
    old, advantage = normal(6), normal(6, seed=1)
    new = (old + torch.tensor([0.0, 0.001, -0.001, 0.05, -0.05, 0.3])).requires_grad_()
    loss = lambda at: baselines.clipped_loss(at, old, advantage, 0.02)
    assert torch.autograd.gradcheck(loss, new)
    (gradient,) = torch.autograd.grad(loss(new), new)
    beyond = ((new - old).exp() > 1.02) & (advantage > 0) | ((new - old).exp() < 0.98) & (advantage < 0)
    assert 0 < beyond.sum() < 6
    assert torch.equal(gradient == 0, beyond)
    (at_old,) = torch.autograd.grad(loss(at := old.clone().requires_grad_()), at)
    assert torch.allclose(at_old, -advantage / 6)


def test_the_kl_term_is_the_divergence_of_the_steps_normals():
    theta, base = torch.tensor([0.3, -0.4], dtype=torch.float64), torch.tensor([0.1, 0.0], dtype=torch.float64)
    policy = Policy(kl_weight=2.0)
    path = baselines.stochastic_rollout(linear(theta), lambda purpose: normal(5, 1), SIGMAS, policy)
    losses = list(baselines.step_losses(linear(theta), linear(base), path, torch.zeros(5), SIGMAS, policy))
    for i, loss in enumerate(losses):
        ours, theirs = (
            torch.distributions.Normal(*cps_moments(path.states[i], linear(t)(path.states[i], 0), SIGMAS, i, 0.7))
            for t in (theta, base)
        )
        divergence = torch.distributions.kl_divergence(ours, theirs).mean()
        assert (loss * len(losses)).item() == pytest.approx(2 * divergence.item())


def policy_trainer(make_args, policy, **changes):
    args = make_args(**changes)
    trainer = PolicyGradientTrainer(policy, args, model=tiny_pipeline(), reward_funcs=redness, train_dataset=PROMPTS)
    return trainer


def test_a_group_is_one_prompt_with_different_noise(make_args):
    trainer = policy_trainer(make_args, Policy(group_size=2), per_device_train_batch_size=4)
    first, second = (trainer.batches.batch(step, 0) for step in (0, 1))
    assert first.prompts[0] == first.prompts[1] != first.prompts[2] == first.prompts[3]
    assert len({*first.prompts, *second.prompts}) == 4
    assert len(first.noise("train").unique(dim=0)) == 4
    assert {*first.prompts, *second.prompts} <= {*trainer.batches.prompts_from_rollout(0)}
    with pytest.raises(ValueError, match="expected a multiple of group_size=3"):
        policy_trainer(make_args, Policy(group_size=3), per_device_train_batch_size=4, overwrite_output_dir=True)


def test_policy_gradients_raise_the_reward(make_args):
    policy = Policy(group_size=8, updates=1, noise_level=0.7)
    trainer = policy_trainer(
        make_args, policy, per_device_train_batch_size=32, max_steps=20, learning_rate=3e-2, lora_rank=8
    )
    rewards = [trainer.step(step)["reward"] for step in range(20)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.05


def test_rows_of_a_trajectory_stay_together():
    path = Trajectory([normal(4, 2), normal(4, 2, seed=1)], [normal(4, seed=2)])
    part = path.rows(torch.tensor([3, 1]))
    assert torch.equal(part.states[1], path.states[1][[3, 1]])
    assert torch.equal(part.log_probs[0], path.log_probs[0][[3, 1]])


def test_the_best_of_n_is_the_best_of_the_first_n():
    scores = torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 9.0]])  # of sample and prompt
    video_of = lambda number: (scores[number] * 10).view(2, 1, 1, 1, 1)
    kept = dict(baselines.best_of(3, video_of, lambda video: video.flatten() / 10, [1, 2, 3]))
    assert {n: best.flatten().tolist() for n, best in kept.items()} == {1: [10, 50], 2: [30, 50], 3: [30, 90]}
