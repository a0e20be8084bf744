"""The published ways to send a reward's gradient into a denoiser, as plans for one sampler.

Written for the flow x_sigma = (1 - sigma) x0 + sigma noise with velocity v = dx/dsigma. A model's
estimate of x0 is x - sigma v, an Euler step straight to sigma 0. docs/methods.md compares the
methods.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from rlhf.config import RewardGradientConfig
from rlhf.generator.flow import euler_step
from rlhf.method.adjoint_matching import AdjointMatching
from rlhf.method.drift import drift_step_weights
from rlhf.method.flow_grpo import FlowGRPO
from rlhf.method.grad_steps import choose_grad_steps, draw_below, listed_grad_steps
from rlhf.method.leap_align import Leaps, draw_leaps
from rlhf.method.nft import NFT
from rlhf.method.options import MethodOptions, NFTOptions, SRPOOptions
from rlhf.method.regression import Regression
from rlhf.method.rollout import Velocity


@dataclass(frozen=True)
class Plan:
    """The course of all rollouts of one optimizer step, the same on all processes."""

    sigmas: torch.Tensor  # (M+1,) from 1 to 0; M is below the sampler's N where the last step jumps or is left out
    grad_steps: list[int]  # as in `rollout`
    detach_input: bool = False  # as in `rollout`
    repeat_last_step: int = 0  # repeats of the last step from fresh noise, each with a gradient
    recoveries: list[tuple[float, float]] = field(default_factory=list)  # Direct-Align's (sigma, step)
    leaps: Leaps | None = None  # those that carry the gradient in place of steps
    regression: Regression | None = None  # what is learnt instead of the reward's gradient
    drift_step: int | None = None  # the step at whose state the drift from the base is measured
    drift_total: float = 0.0  # the sum of all steps' drift weights, for which drift_step stands

    @property
    def window_start(self) -> int:
        """Index of the state at which the window starts; the last state if no step has gradient."""
        return self.grad_steps[0] if self.grad_steps else len(self.sigmas) - 1

    @property
    def num_samples(self) -> int:
        """Number of samples from each rollout, each with its own backward pass."""
        return len(self.recoveries) or 1 + self.repeat_last_step


@dataclass(frozen=True)
class Sample:
    """Latents (B, C, T, H, W) with their graph, to decode, score and back-propagate."""

    latents: torch.Tensor  # x0, or an estimate of it
    penalty: bool = False  # whether the opposite of the reward is to be maximised
    state: torch.Tensor | None = None  # what rewards of latents see in place of `latents`
    sigma: float = 0.0  # its noise level

    @property
    def scored_latents(self) -> torch.Tensor:
        """Return the latents that rewards of latents score: the noisy `state` if there is one."""
        return self.latents if self.state is None else self.state


def make_plan(args: RewardGradientConfig, options: MethodOptions, sigmas: torch.Tensor, rng: torch.Generator) -> Plan:
    """Return the plan of `args.method` for one optimizer step.

    rng: of seed and step; draws what the method leaves open.
    """
    num_steps, num_grad = len(sigmas) - 1, args.num_grad_steps
    match args.method:
        case "draft_k":
            plan = Plan(sigmas, choose_grad_steps("last", num_steps, num_grad))
        case "draft_lv":
            plan = Plan(sigmas, [num_steps - 1], repeat_last_step=options.num_draws)
        case "alignprop":
            plan = Plan(sigmas, choose_grad_steps("random_last", num_steps, num_grad, rng))
        case "uniform":
            plan = Plan(sigmas, choose_grad_steps("uniform", num_steps, num_grad, rng))
        case "listed":
            plan = Plan(sigmas, listed_grad_steps(options.steps, num_steps))
        case "drtune":
            cut = jump_early(sigmas, options.jump_steps, rng)
            plan = Plan(cut, choose_grad_steps("uniform", len(cut) - 1, num_grad, rng), detach_input=True)
        case "refl":
            cut = jump_early(sigmas, options.jump_steps or -(-num_steps // 4), rng)
            plan = Plan(cut, [len(cut) - 2])
        case "srpo":
            plan = Plan(sigmas, [], recoveries=draw_recoveries(options, rng))
        case "prfl":
            step = num_steps - 1 - draw_below(options.drawn_steps or num_steps, rng)
            plan = Plan(sigmas[: step + 2], [step])
        case "nft":
            plan = Plan(sigmas, [], regression=draw_regression(options, sigmas, rng))
        case "flow_grpo":
            noise = options.noise, options.noise_level
            plan = Plan(
                sigmas, [], regression=FlowGRPO(options.group_size, *noise, options.kl_weight, options.advantage_clip)
            )
        case "adjoint_matching":
            steps = options.adjoint_steps or num_steps
            plan = Plan(sigmas, [], regression=AdjointMatching(options.reward_scale, steps))
        case "leap_align":
            plan = Plan(sigmas, [], leaps=draw_leaps(options, num_steps, rng))
    return with_drift(shorten_prefix(plan, args.prefix_steps), args, options, rng)


def shorten_prefix(plan: Plan, steps: int | None, exponent: float = 2.0) -> Plan:
    """Return the plan with at most `steps` steps before its window; None keeps all. Not exact.

    Step i of n begins at index (i / n)^exponent of the window's start, so that more of the first
    steps are kept, which settle what a video shows (bench/caching.py compares exponents; 1 is
    evenly spaced). The noise levels of the window are unchanged.
    """
    window, sigmas = plan.window_start, plan.sigmas
    if not plan.grad_steps or steps is None or steps >= window:
        return plan
    index = torch.arange(steps + 1)
    kept = index.maximum((window * (index / steps) ** exponent).round().long())  # none of them twice
    shortened = torch.cat([sigmas[kept.to(sigmas.device)], sigmas[window + 1 :]])
    return replace(plan, sigmas=shortened, grad_steps=[step - window + steps for step in plan.grad_steps])


def jump_early(sigmas: torch.Tensor, of_last: int, rng: torch.Generator) -> torch.Tensor:
    """Return sigmas that jump to 0 from one of the last `of_last` steps, drawn uniformly."""
    last = len(sigmas) - 2 - draw_below(of_last, rng)
    return torch.cat([sigmas[: last + 1], sigmas[-1:]])


def draw_recoveries(options: SRPOOptions, rng: torch.Generator) -> list[tuple[float, float]]:
    """Draw noise levels evenly from align_sigmas, each reached from above and then from below.

    From above is a denoising step (negative), from below an inversion (positive).
    """
    low, high = options.align_sigmas
    levels = torch.rand(-(-options.num_draws // 2), generator=rng, dtype=torch.float64) * (high - low) + low
    both_ways = [(sigma, step) for sigma in levels.tolist() for step in (-options.align_delta, options.align_delta)]
    return both_ways[: options.num_draws]


def draw_regression(options: NFTOptions, sigmas: torch.Tensor, rng: torch.Generator) -> NFT:
    """Draw `num_levels` different noise levels of the sampler, at most all but 0."""
    drawn = torch.randperm(len(sigmas) - 1, generator=rng)[: options.num_levels]
    return NFT(options.group_size, [sigmas[i] for i in drawn], options.beta, options.advantage_clip)


def with_drift(plan: Plan, args: RewardGradientConfig, options: MethodOptions, rng: torch.Generator) -> Plan:
    """Return the plan with a step drawn by its drift weight if the drift is to be measured."""
    if not (args.drift_weight or options.negative_drift_weight or args.anchor_steps):
        return plan
    even = args.guidance_gradient == "distill" or options.negative_drift_weight > 0
    weights = drift_step_weights(plan.sigmas, even).cpu()
    step = int(torch.multinomial(weights, 1, generator=rng))
    return replace(plan, drift_step=step, drift_total=weights.sum().item())


def gradient_samples(
    window: Velocity, states: list[torch.Tensor | None], noise: Callable[[str], torch.Tensor], plan: Plan
) -> Iterator[Sample]:
    """Yield the samples of one rollout, each with its own graph; back-propagate each at once.

    Args:
        window: the velocity of steps that carry the gradient.
        states: x_0 (noise) .. x_N (video) of the rollout, (B, C, T, H, W) each; x_N has its graph.
            The list is emptied, since the states of a long video are large.
        noise: purpose -> unit normal noise (B, C, T, H, W); "train" is the rollout's.
        plan: that of the rollout.
    """
    x0_BCTHW = plan.leaps.connect(window, states, plan.sigmas) if plan.leaps else states[-1]
    end, sigma = Sample(x0_BCTHW), plan.sigmas[-1].item()
    if sigma > 0:  # not finished: rewards of latents score the state, the others an estimate of x0
        end = Sample(estimate_x0(states[-2], x0_BCTHW, *plan.sigmas[-2:]), state=x0_BCTHW, sigma=sigma)
    states.clear()
    if not plan.recoveries:
        yield end
    for sigma, step in plan.recoveries:
        recovered = recover(window, x0_BCTHW, noise("train"), plan.sigmas.new_tensor(sigma), step)
        yield Sample(recovered, penalty=step > 0)
    for draw in range(plan.repeat_last_step):
        again = repeat_last_step(window, x0_BCTHW.detach(), noise(f"draw {draw}"), plan.sigmas[-2])
        yield Sample(again)


def repeat_last_step(velocity: Velocity, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Return x0 after noising to `sigma`, the start of the last step, and that step again.

    DRaFT-LV, arXiv 2309.17400, algorithm 1. x0: detached, else the gradient also runs through the
    rollout.
    """
    x = (1 - sigma) * x0 + sigma * noise
    return euler_step(x, velocity(x, sigma), sigma, torch.zeros_like(sigma))


def estimate_x0(x: torch.Tensor, x_next: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """Return the estimate of x0 to which the Euler step from x to x_next leads: x - sigma v."""
    return euler_step(x_next, (x_next - x) / (sigma_next - sigma), sigma_next, torch.zeros_like(sigma))


def recover(
    velocity: Velocity, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, step: float
) -> torch.Tensor:
    """Return x0 as one Euler step onto sigma recovers it (Direct-Align, 2509.06942, eq. 4 and 5).

    With step < 0 the step denoises from sigma - step; with step > 0 it inverts, up from there (eq.
    12 and 13). The velocity noise - x0 returns x0 exactly; another velocity moves it by
    step / (1 - sigma) times the difference.
    """
    start = sigma - step
    x = (1 - start) * x0 + start * noise
    x = euler_step(x, velocity(x, start), start, sigma)
    return (x - sigma * noise) / (1 - sigma)
