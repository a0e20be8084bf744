"""Options of a method that other methods do not read, given as the setting `method_kwargs`.

A new method adds its options here and its plan to `make_plan`; it needs no further setting.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass
from typing import Literal

from rlhf.config import METHODS, ConfigError, RewardGradientConfig, range_problems, setting
from rlhf.config.coerce import coerce_all


@dataclass(frozen=True)
class MethodOptions:
    """Options of every method: relative scores (2509.06942), robust gradients, drift, videos."""

    relative_words: list[str] | None = setting(
        None,
        "Two phrases, positive and negative, put before each prompt. The score is then "
        "(1 + k) R(positive) - R(negative). Default: the prompts as they are.",
    )
    relative_strength: float = setting(0.2, "k of relative_words, without unit.", least=0)
    reward_perturbation: float = setting(
        0.0,
        "Take the reward's gradient at a video moved a step against the reward (arXiv 2603.21175), of this root "
        "mean square over pixel values in [0, 1]. Costs a second scoring. 0: at the video itself.",
        least=0,
        below=1,
    )
    weight_perturbation: float = setting(
        0.0,
        "Take the gradient at an adapter moved this far up the loss (arXiv 2603.21175), as the norm of the step in "
        "float32 weights. Costs a second gradient. 0: at the adapter itself.",
        least=0,
    )

    negative_drift_weight: float = setting(
        0.0,
        "Weight of the drift of the negative prompt's velocity alone, mean square over latent elements, in place of "
        "drift_weight. It costs one branch, and holds what prompts leave open, not what they ask for. 0: none.",
        least=0,
    )
    anchor_data_steps: int = setting(
        0,
        "Every n-th optimizer step adds the loss of flow matching on real videos, those of the setting anchor_data, "
        "for one velocity with gradient, without guidance. 0: none.",
        least=0,
    )
    anchor_data_weight: float = setting(
        1.0, "Weight of that loss, the squared error of the velocity, a mean over latent elements.", above=0
    )

    def problems(self) -> list[str]:
        """Return what does not fit together in these options; ranges are checked elsewhere."""
        words, strength, default = self.relative_words, self.relative_strength, MethodOptions.relative_strength
        if words is not None and len(words) != 2:
            return [f"relative_words: got {words}, expected two phrases, positive and negative; give both"]
        if words is None and strength != default:
            got = f"relative_strength: got {strength} without relative_words"
            return [f"{got}, on which it builds, expected {default}; set both or none"]
        return []


@dataclass(frozen=True)
class DraftLVOptions(MethodOptions):
    """Options of draft_lv (arXiv 2309.17400, algorithm 1)."""

    num_draws: int = setting(2, "Times that the last step is taken again, each from fresh noise.", least=1)


@dataclass(frozen=True)
class ListedOptions(MethodOptions):
    """Options of listed."""

    steps: list[int] | None = setting(None, "Denoising steps with gradient, of 0 to N-1. Needed.")


@dataclass(frozen=True)
class DRTuneOptions(MethodOptions):
    """Options of drtune (arXiv 2405.00760, algorithm 1)."""

    jump_steps: int = setting(
        1,
        "Last steps from which the rollout may jump to x0, one of them drawn for each optimizer step. 1: no jump.",
        least=1,
    )


@dataclass(frozen=True)
class ReFLOptions(MethodOptions):
    """Options of refl (arXiv 2304.05977, algorithm 1)."""

    jump_steps: int | None = setting(
        None,
        "Last steps from which the rollout may jump to x0, one of them drawn for each optimizer step. "
        "Default: a quarter of the steps, as 10 of 40 in the paper.",
        least=1,
    )


@dataclass(frozen=True)
class SRPOOptions(MethodOptions):
    """Options of srpo (arXiv 2509.06942, eq. 4, 5, 12, 13); the defaults are those of its code."""

    num_draws: int = setting(2, "Gradients of each rollout; every second one is of a penalty.", least=1)
    align_sigmas: list[float] = setting(
        [0.75, 0.96], "Lowest and highest noise level sigma at which videos are recovered."
    )
    align_delta: float = setting(0.02, "Length, in sigma, of the one step that a recovered video takes.", above=0)
    offline: bool = setting(
        False, "Recover the real videos of the setting anchor_data, with their captions: no rollout at all."
    )

    def problems(self) -> list[str]:
        """Return what does not fit together, noise levels included."""
        low, high = self.align_sigmas if len(self.align_sigmas) == 2 else (1.0, 0.0)
        if self.align_delta <= low <= high and high + self.align_delta <= 1:
            return super().problems()
        return super().problems() + [
            f"align_sigmas={self.align_sigmas} with align_delta={self.align_delta}: expected [from, to] with "
            "align_delta <= from <= to <= 1 - align_delta, for a step on both sides of each level; correct them"
        ]


@dataclass(frozen=True)
class NFTOptions(MethodOptions):
    """Options of nft (arXiv 2509.16117)."""

    group_size: int = setting(8, "Videos of each prompt, whose scores are compared with each other.", least=2)
    num_levels: int = setting(
        2, "Noise levels at which each video is learnt from, drawn from those of the sampler.", least=1
    )
    beta: float = setting(1.0, "Part of a velocity's change that the loss sees. A smaller one learns faster.", above=0)
    advantage_clip: float = setting(
        5.0, "Spreads of its group beyond which a video's score counts as the best or worst.", above=0
    )
    old_decay: float = setting(
        0.5,
        "Decay of the average of the weights that samples the videos. 0: the current weights.",
        least=0,
        below=1,
    )


@dataclass(frozen=True)
class FlowGRPOOptions(MethodOptions):
    """Options of flow_grpo (arXiv 2505.05470)."""

    group_size: int = setting(
        8, "Videos of each prompt, whose scores are compared with each other. Paper: 24.", least=2
    )
    noise: Literal["cps", "sde"] = setting(
        "cps",
        "Fresh noise of a step: cps keeps the flow's noise level in steps of any length (arXiv 2509.05952); sde is "
        "the paper's equation 9, for many short steps.",
    )
    noise_level: float = setting(
        0.7, "Amount of fresh noise; of cps, 1 renews all noise at every step.", above=0, most=1
    )
    kl_weight: float = setting(
        0.0,
        "Weight of the KL divergence of a step from the base's, in nats per latent element. Paper: 0.04. Costs a "
        "velocity of the base a step.",
        least=0,
    )
    advantage_clip: float = setting(5.0, "Largest advantage, in standard deviations of the group.", above=0)


@dataclass(frozen=True)
class AdjointMatchingOptions(MethodOptions):
    """Options of adjoint_matching (arXiv 2605.06583)."""

    adjoint_steps: int | None = setting(
        None, "Last steps that the adjoint visits and that are trained. Default: all.", least=1
    )
    reward_scale: float = setting(
        1.0,
        "c, where R - |v - v_base|^2 / (2 c) is to be maximised, a mean over latent elements: the larger, the "
        "farther from the base.",
        above=0,
    )


@dataclass(frozen=True)
class LeapAlignOptions(MethodOptions):
    """Options of leap_align (arXiv 2604.15311, eq. 9 and 12); the defaults are the paper's."""

    leap_discount: float = setting(
        0.3,
        "Factor of the gradient that reaches the first leap through the second one's input. 0: none of it, as "
        "drtune; 1: all.",
        least=0,
        most=1,
    )
    leap_tolerance: float = setting(
        0.1,
        "Mean distance of a leap from the rollout, per latent element, below which it has full weight. Farther "
        "leaps weigh less.",
        above=0,
    )


@dataclass(frozen=True)
class PRFLOptions(MethodOptions):
    """Options of prfl (arXiv 2511.21541)."""

    drawn_steps: int | None = setting(
        None,
        "Last steps of the sampler of which one is drawn for each optimizer step; a head that cannot rank noisy "
        "latents is spared them. Default: all.",
        least=1,
    )


METHOD_OPTIONS: dict[str, type[MethodOptions]] = dict.fromkeys(METHODS, MethodOptions) | {
    "draft_lv": DraftLVOptions,
    "listed": ListedOptions,
    "drtune": DRTuneOptions,
    "refl": ReFLOptions,
    "srpo": SRPOOptions,
    "prfl": PRFLOptions,
    "nft": NFTOptions,
    "flow_grpo": FlowGRPOOptions,
    "adjoint_matching": AdjointMatchingOptions,
    "leap_align": LeapAlignOptions,
}
SCORES_ALONE = ("nft", "flow_grpo")  # methods that ask rewards for no gradient
AUTO_CHOICES = WITH_GRADIENT, WITHOUT_GRADIENT = "draft_k", "nft"  # what method auto becomes


def option_names(method: str) -> list[str]:
    """Return the names of a method's options."""
    return [field.name for field in dataclasses.fields(METHOD_OPTIONS[method])]


def read_options(method: str, kwargs: dict | None) -> MethodOptions:
    """Return `method_kwargs` as options of the method. Raises ConfigError with every problem."""
    kind, kwargs = METHOD_OPTIONS[method], kwargs or {}
    known = {name: value for name, value in kwargs.items() if name in option_names(method)}
    problems = [_unknown_option(name, method) for name in kwargs if name not in known]
    values, wrong = coerce_all(known, typing.get_type_hints(kind))
    options = kind(**values)
    problems += wrong + list(range_problems(options)) + ([] if wrong else options.problems())
    if problems:
        raise ConfigError([f"method_kwargs: {problem}" for problem in problems])
    return options


def is_offline(args: RewardGradientConfig) -> bool:
    """Return whether a run learns at real videos in place of rollouts."""
    return args.method == "srpo" and read_options(args.method, args.method_kwargs).offline


def _unknown_option(name: str, method: str) -> str:
    """Return the problem of an option that a method lacks; suggest its method or nearest name."""
    if owners := [other for other in METHODS if name in option_names(other)]:
        cure = f"leave it out, or choose method {' or '.join(owners)}, which has it"
        return f"got {name} with method {method}, expected {', '.join(option_names(method))}; {cure}"
    near = difflib.get_close_matches(name, option_names(method), n=1, cutoff=0.5)
    cure = f"did you mean {near[0]!r}?" if near else "leave it out"
    return f"got {name!r}, expected an option of method {method}: {', '.join(option_names(method))}; {cure}"
