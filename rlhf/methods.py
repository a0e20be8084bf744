"""The published ways to send a reward's gradient into a denoiser, each as a plan for the same sampler.

Written for the flow x_sigma = (1 - sigma) x0 + sigma noise with velocity v = dx/dsigma, in which a model's guess of x0
is x - sigma v: an Euler step straight to sigma 0. docs/methods.md compares them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from rlhf.config import RewardGradientConfig
from rlhf.contentv.flow import euler_step
from rlhf.drift import step_weights
from rlhf.grad_steps import choose_grad_steps, draw_below
from rlhf.method.options import MethodOptions, SRPOOptions
from rlhf.prefix import fewer_steps
from rlhf.sampler import Velocity, rollout


@dataclass(frozen=True)
class Plan:
    """What one optimizer step does with each of its rollouts, the same for all of them and on all processes."""

    sigmas: torch.Tensor  # (M+1,) of the rollout, from 1 to 0; fewer than the sampler's where the last step jumps
    grad_steps: list[int]  # as in `rollout`
    detach_input: bool = False  # as in `rollout`
    last_step_again: int = 0  # how often the last step is taken again from fresh noise, each with its own gradient
    recoveries: list[tuple[float, float]] = field(default_factory=list)  # (sigma, signed step) of direct-align
    drift_step: int | None = None  # the step at whose state the drift from the base is measured
    drift_total: float = 0.0  # the sum of all steps' weights, for which that one stands

    @property
    def num_samples(self) -> int:
        """Gradients taken of each rollout."""
        return len(self.recoveries) or 1 + self.last_step_again


@dataclass(frozen=True)
class Sample:
    """Something to decode, score and back-propagate: latents_BCTHW with their graph."""

    latents: torch.Tensor
    penalty: bool = False  # the opposite of the reward is to be maximised


def make_plan(args: RewardGradientConfig, options: MethodOptions, sigmas: torch.Tensor, rng: torch.Generator) -> Plan:
    """Return the plan of `args.method` for one optimizer step.

    options: those of `args.method`, as `read_options` returns them. rng: of seed and step; draws what
    the method leaves open.
    """
    num_steps, num_grad = len(sigmas) - 1, args.num_grad_steps
    match args.method:
        case "draft_k":
            plan = Plan(sigmas, choose_grad_steps("last", num_steps, num_grad))
        case "draft_lv":
            plan = Plan(sigmas, [num_steps - 1], last_step_again=options.num_draws)
        case "alignprop":
            plan = Plan(sigmas, choose_grad_steps("random_last", num_steps, num_grad, rng))
        case "uniform":
            plan = Plan(sigmas, choose_grad_steps("uniform", num_steps, num_grad, rng))
        case "listed":
            plan = Plan(sigmas, choose_grad_steps("listed", num_steps, 0, listed=options.steps))
        case "drtune":
            cut = jump_early(sigmas, options.jump_steps, rng)
            plan = Plan(cut, choose_grad_steps("uniform", len(cut) - 1, num_grad, rng), detach_input=True)
        case "refl":
            cut = jump_early(sigmas, options.jump_steps or -(-num_steps // 4), rng)
            plan = Plan(cut, [len(cut) - 2])
        case "srpo":
            plan = Plan(sigmas, [], recoveries=draw_recoveries(options, rng))
    return watch_drift(shorten_prefix(plan, args.prefix_steps), args, rng)


def shorten_prefix(plan: Plan, steps: int | None) -> Plan:
    """The plan with at most so many steps before its window, None for as many as there are. Not exact."""
    window = plan.grad_steps[0] if plan.grad_steps else 0
    if steps is None or steps >= window:
        return plan
    shifted = [step - window + steps for step in plan.grad_steps]
    return replace(plan, sigmas=fewer_steps(plan.sigmas, window, steps), grad_steps=shifted)


def jump_early(sigmas: torch.Tensor, of_last: int, rng: torch.Generator) -> torch.Tensor:
    """The noise levels of a rollout whose last step, drawn evenly from the `of_last` last ones, goes straight to 0."""
    last = len(sigmas) - 2 - draw_below(of_last, rng)
    return torch.cat([sigmas[: last + 1], sigmas[-1:]])


def draw_recoveries(options: SRPOOptions, rng: torch.Generator) -> list[tuple[float, float]]:
    """Draw noise levels evenly from align_sigmas, each reached from above (a denoising step) and below (inversion)."""
    low, high = options.align_sigmas
    levels = torch.rand(-(-options.num_draws // 2), generator=rng, dtype=torch.float64) * (high - low) + low
    both_ways = [(sigma, step) for sigma in levels.tolist() for step in (-options.align_delta, options.align_delta)]
    return both_ways[: options.num_draws]


def watch_drift(plan: Plan, args: RewardGradientConfig, rng: torch.Generator) -> Plan:
    """The plan with a step drawn by its weight in the drift, if drift is to be measured; see `rlhf.drift`."""
    if not (args.drift_weight or args.anchor_steps):
        return plan
    weights = step_weights(plan.sigmas, args.drift_weighting).cpu()
    step = int(torch.multinomial(weights, 1, generator=rng))
    return replace(plan, drift_step=step, drift_total=weights.sum().item())


def gradient_samples(
    velocity: Velocity, noise: Callable[[str], torch.Tensor], plan: Plan, reuse: Callable | None = None
) -> Iterator[Sample]:
    """One rollout and the samples that the plan takes of it, one after the other: back-propagate each at once.

    noise: (purpose) -> unit normal noise (B, C, T, H, W), the same at every call for the same purpose. reuse: as in
    `rollout`.
    """
    noise_BCTHW = noise("train")
    latents = rollout(velocity, noise_BCTHW, plan.sigmas, plan.grad_steps, plan.detach_input, reuse)
    for sigma, step in plan.recoveries:
        yield Sample(recover(velocity, latents, noise_BCTHW, plan.sigmas.new_tensor(sigma), step), penalty=step > 0)
    if plan.recoveries:
        return
    yield Sample(latents)
    for draw in range(plan.last_step_again):
        yield Sample(last_step_again(velocity, latents.detach(), noise(f"draw {draw}"), plan.sigmas[-2]))


def last_step_again(velocity: Velocity, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """x0 noised to the last step's level and denoised once more (DRaFT-LV, arXiv 2309.17400, algorithm 1)."""
    x = (1 - sigma) * x0 + sigma * noise
    return euler_step(x, velocity(x, sigma), sigma, torch.zeros_like(sigma))


def recover(
    velocity: Velocity, x0: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor, step: float
) -> torch.Tensor:
    """x0 from one Euler step onto level sigma and the known noise (Direct-Align, arXiv 2509.06942, eq. 4 and 5).

    step < 0 denoises from sigma - step; step > 0 inverts, up from there (eq. 12 and 13). The velocity noise - x0 gives
    x0 back exactly; another moves it by step / (1 - sigma) times the difference.
    """
    start = sigma - step
    x = (1 - start) * x0 + start * noise
    x = euler_step(x, velocity(x, start), start, sigma)
    return (x - sigma * noise) / (1 - sigma)
