"""What the method and the adapter of a run ask of the other settings and of the model."""

import difflib
import re
from collections.abc import Iterator

import torch

from rlhf.config import RewardGradientConfig

# Which settings belong to which methods; elsewhere they keep their default, so that none is silently without effect.
BELONGS = {
    "num_grad_steps": ("draft_k", "alignprop", "uniform", "drtune"),
    "grad_steps": ("listed",),
    "jump_steps": ("refl", "drtune"),
    "num_draws": ("draft_lv", "srpo"),
    "align_sigmas": ("srpo",),
    "align_delta": ("srpo",),
}
# And those that say how another one works, by what has to be set.
BUILDS_ON = {"relative_strength": ("relative_words",), "drift_weighting": ("drift_weight", "anchor_steps")}
METHODS = ("draft_k", "draft_lv", "alignprop", "uniform", "listed", "drtune", "refl", "srpo")
GUIDANCE_GRADIENTS = ("full", "text", "none", "distill")


def is_distilled(settings: dict) -> bool:
    """Whether the adapter of a run with these settings does what guidance does, and is sampled without it."""
    return settings.get("guidance_gradient") == "distill"


def method_problems(args: RewardGradientConfig) -> Iterator[str]:
    """Problems of the method, guidance and drift; args has all sampling keys set."""
    yield from _belonging(args)
    yield from _steps(args)
    yield from _drift(args)
    yield from _direct_align(args)


def adapter_problems(args: RewardGradientConfig, transformer: dict) -> Iterator[str]:
    """Problems of what is to be trained. transformer: its config, of which one is made where modules are named."""
    if args.weight_decay and args.lora_use_dora:
        yield (
            f"weight_decay: got {args.weight_decay} with lora_use_dora, expected 0: it would pull the "
            "model's own weights to 0; hold them with drift_weight instead"
        )
    for name in ("lora_rank_pattern", "lora_alpha_pattern"):
        for layer, value in (getattr(args, name) or {}).items():
            if value < 1:
                yield f"{name}: got {value} for {layer!r}, expected at least 1; raise it"
    if args.lora_target_modules or args.lora_rank_pattern or args.lora_alpha_pattern:
        yield from _named_modules(args, transformer)


def _named_modules(args, transformer):
    from rlhf.contentv.transformer import SD3Transformer3DModel  # seconds, for those alone who name modules

    with torch.device("meta"):
        model = SD3Transformer3DModel.from_config(transformer)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    ends = {name.split("blocks.")[-1].split(".", 1)[-1] for name in layers}  # to_q of transformer_blocks.3.attn.to_q
    ends |= {end.split(".", 1)[-1] for end in ends}
    for target in args.lora_target_modules or []:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            near = difflib.get_close_matches(target, ends, n=1, cutoff=0.4)
            cure = f"did you mean {near[0]!r}?" if near else "correct it"
            yield f"lora_target_modules: got {target!r}, expected the end of a linear layer's name such as to_q; {cure}"
    yield from _adapted_layers(args, layers)


def _adapted_layers(args, layers):
    """Problems of patterns that match no adapted layer. layers: the model's linear ones."""
    from rlhf.lora import ATTENTION

    ends = [f".{name}" for name in args.lora_target_modules or ATTENTION]
    adapted = [name for name in layers if any(f".{name}".endswith(end) for end in ends)]
    for name in ("lora_rank_pattern", "lora_alpha_pattern"):
        for pattern in getattr(args, name) or {}:
            if not _matches(pattern, adapted):
                expected = "expected the end of an adapted layer's name such as to_q, or a regular expression of it"
                yield f"{name}: got {pattern!r}, {expected}; correct it"


def _matches(pattern: str, names: list[str]) -> bool:
    """Whether peft finds one of the names by the pattern."""
    try:
        return any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
    except re.error:
        return False


def _belonging(args):
    default = RewardGradientConfig()
    for name, methods in BELONGS.items():
        if args.method in METHODS and args.method not in methods and getattr(args, name) != getattr(default, name):
            yield (
                f"{name}: got {getattr(args, name)} with method {args.method}, which has no use for it; expected "
                f"{getattr(default, name)}, or method {' or '.join(methods)}; change one of the two"
            )
    for name, needed in BUILDS_ON.items():
        if getattr(args, name) != getattr(default, name) and not any(getattr(args, other) for other in needed):
            got = f"got {getattr(args, name)} without {' or '.join(needed)}, on which it builds"
            yield f"{name}: {got}, expected {getattr(default, name)}; set that, too, or leave it out"


def _steps(args):
    steps, early = args.num_inference_steps, args.jump_steps or 1
    if args.num_grad_steps > steps:
        yield (
            f"num_grad_steps={args.num_grad_steps} exceeds num_inference_steps={steps}: only a step "
            "that is taken can carry a gradient; lower num_grad_steps"
        )
    elif args.method == "alignprop" and args.num_grad_steps == 1:
        yield (
            "num_grad_steps: got 1 with method alignprop, which draws a number from 1 to it, expected at least 2; "
            f"raise it, to num_inference_steps={steps} for the published method"
        )
    if early > steps:
        yield f"jump_steps={early} exceeds num_inference_steps={steps}, expected at most that; lower jump_steps"
    elif args.method == "drtune" and args.num_grad_steps > steps - early + 1:
        yield (
            f"num_grad_steps={args.num_grad_steps} and jump_steps={early} leave too few steps: a rollout may jump to "
            f"x0 after {steps - early + 1} of num_inference_steps={steps}; lower one of the first two"
        )
    wrong = [i for i in args.grad_steps or [] if not 0 <= i < steps]
    if args.method == "listed" and (not args.grad_steps or wrong or len(set(args.grad_steps)) < len(args.grad_steps)):
        yield (
            f"grad_steps: got {args.grad_steps} with method listed, expected different steps of 0 to {steps - 1}, at "
            "least one; correct them"
        )


def _drift(args):
    if args.guidance_gradient == "distill" and not args.drift_weight:
        yield (
            "guidance_gradient: got distill with drift_weight 0, which would teach the adapter no guidance; set "
            "drift_weight above 0, with drift_weighting even"
        )
    if args.guidance_gradient == "distill" and args.guidance_scale <= 1:
        yield f"guidance_scale: got {args.guidance_scale} with distill, expected above 1: there is no guidance to teach"
    if args.anchor_steps == 1:
        yield "anchor_steps: got 1, which leaves no step for the reward, expected 0 or at least 2; raise it"


def _direct_align(args):
    low, high = args.align_sigmas if len(args.align_sigmas) == 2 else (1.0, 0.0)
    if not (0 < low <= high < 1 and args.align_delta > 0 and low >= args.align_delta and high + args.align_delta <= 1):
        yield (
            f"align_sigmas={args.align_sigmas} with align_delta={args.align_delta}: expected [from, to] with "
            "align_delta <= from <= to <= 1 - align_delta, for a step on both sides of each level; correct them"
        )
    if args.relative_words is not None and len(args.relative_words) != 2:
        yield f"relative_words: got {args.relative_words}, expected two phrases, positive and negative; give both"
