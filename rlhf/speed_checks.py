"""What the settings about speed and memory ask of each other."""

from collections.abc import Iterator

from rlhf.attention import KERNELS
from rlhf.config import RewardGradientConfig
from rlhf.optimizer import OPTIMIZERS, missing_optimizer
from rlhf.quantise import missing_library

CHOICES = {
    "attention_kernel": ("auto", "default", *KERNELS),
    "decode_caches": ("keep", "recompute", "host"),
    "base_bits": (None, 8, 4),
    "vae_dtype": ("float32", "bfloat16"),
    "sampling_weights": ("own", "merged", "float8"),
    "optim": OPTIMIZERS,
}
AT_LEAST_ONE = ("decode_window", "prefix_steps", "guidance_every", "rollout_uses")
OF_RECOMPUTED_BLOCKS = ("keep_attention", "offload_activations", "stream_weights")
# Methods whose window with gradient is the end of the rollout, without gaps; and those where it is always the same.
ENDING, FIXED = ("draft_k", "draft_lv", "alignprop", "refl"), ("draft_k", "draft_lv")


def speed_problems(args: RewardGradientConfig) -> Iterator[str]:
    """args has all sampling keys set."""
    for name, choices in CHOICES.items():
        if (value := getattr(args, name)) not in choices:
            yield f"{name}: got {value!r}, expected one of {', '.join(map(str, choices))}; choose one"
    for name in AT_LEAST_ONE:
        if (value := getattr(args, name)) is not None and value < 1:
            yield f"{name}: got {value}, expected at least 1; raise it"
    if args.decode_window is not None and args.decode_window >= args.num_frames:
        yield (
            f"decode_window={args.decode_window} is all of num_frames={args.num_frames}, expected fewer; lower it, or "
            "leave it out"
        )
    for name in OF_RECOMPUTED_BLOCKS:
        if getattr(args, name) and not args.gradient_checkpointing:
            yield f"{name}: got it without gradient_checkpointing, on which it builds, expected both; set that, too"
    if args.decode_caches != "keep" and not args.decode_checkpoint:
        yield f"decode_caches: got {args.decode_caches} without decode_checkpoint, expected both; set that, too"
    yield from _weights(args)
    yield from _prefix(args)


def _weights(args):
    if args.stream_weights and args.base_bits:
        yield "stream_weights and base_bits: got both, expected one: weights of few bits fit; leave one out"
    for name in ("stream_weights", "base_bits"):
        if getattr(args, name) and args.sampling_weights != "own":
            yield f"sampling_weights: got {args.sampling_weights} with {name}, expected own; change one of the two"
    if args.base_bits in (8, 4) and (missing := missing_library(args.base_bits)):
        yield missing
    if missing := missing_optimizer(args.optim):
        yield missing
    if args.lora_use_dora and args.sampling_weights != "own":
        yield f"sampling_weights: got {args.sampling_weights} with lora_use_dora, expected own; change one of the two"


def _prefix(args):
    asked = {
        "prefix_steps": args.prefix_steps is not None,
        "second_order_prefix": args.second_order_prefix,
        "rollout_uses": args.rollout_uses > 1,
    }
    for name, is_asked in asked.items():
        methods = FIXED if name == "rollout_uses" else ENDING
        if is_asked and args.method not in methods:
            yield f"{name}: got it with method {args.method}, expected {', '.join(methods)}; change one of the two"
    before = args.num_inference_steps - args.num_grad_steps
    if args.method == "draft_k" and args.prefix_steps is not None and args.prefix_steps >= before:
        yield (
            f"prefix_steps={args.prefix_steps}, but only {before} of num_inference_steps={args.num_inference_steps} "
            "come before the window; lower it"
        )
    if args.method == "draft_k":
        yield from _without_effect(args, before)
    if args.rollout_uses > 1 and args.drift_weight:
        yield "rollout_uses: got drift_weight, which needs the states of every rollout, expected 0; leave one out"
    if args.guidance_every > 1 and (args.guidance_scale <= 1 or args.guidance_gradient == "distill"):
        yield f"guidance_every: got {args.guidance_every}, but nothing is guided here, expected 1; leave it out"
    if args.guidance_together and args.guidance_scale <= 1:
        yield f"guidance_together: got it with guidance_scale {args.guidance_scale}, which has one branch; leave it out"


def _without_effect(args, before):
    """Ways to take the steps before the window, where there are none, or no second one to take differently."""
    needed = {
        "second_order_prefix": (args.second_order_prefix, 2),
        "guidance_every": (args.guidance_every > 1, 2),
        "sampling_weights": (args.sampling_weights != "own", 1),
        "rollout_uses": (args.rollout_uses > 1, 1),
    }
    for name, (is_asked, least) in needed.items():
        if is_asked and before < least:
            yield (
                f"{name}: got it with {before} of num_inference_steps={args.num_inference_steps} before the window, "
                f"expected at least {least} to take so; lower num_grad_steps, or leave it out"
            )
