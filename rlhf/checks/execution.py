"""Check the settings of speed and memory against each other."""

from collections.abc import Iterator

from rlhf.config import RewardGradientConfig
from rlhf.execution.quantize import missing_library

NEED_CHECKPOINTING = ("keep_attention", "offload_activations", "stream_weights")
# Methods whose window is the end of the rollout, without gaps; and those whose window is fixed.
ENDING, FIXED = ("draft_k", "draft_lv", "alignprop", "refl", "prfl"), ("draft_k", "draft_lv")


def execution_problems(args: RewardGradientConfig) -> Iterator[str]:
    """Yield execution options that lack an option on which they build, or exclude each other.

    args has all sampling keys set.
    """
    if args.decode_window is not None and args.decode_window >= args.num_frames:
        yield (
            f"decode_window={args.decode_window} is all of num_frames={args.num_frames}, expected fewer; lower it, or "
            "leave it out"
        )
    for name in NEED_CHECKPOINTING:
        if getattr(args, name) and not args.gradient_checkpointing:
            yield f"{name}: got it without gradient_checkpointing, on which it builds, expected both; set that, too"
    if args.decode_checkpoint and args.decode_chunk is None:
        yield "decode_checkpoint: got no decode_chunk, expected one, since a single chunk saves nothing; set it to 1"
    if args.decode_caches != "keep" and not args.decode_checkpoint:
        yield f"decode_caches: got {args.decode_caches} without decode_checkpoint, expected both; set that, too"
    yield from _weight_problems(args)
    yield from _prefix_problems(args)


def _weight_problems(args) -> Iterator[str]:
    """Yield the conflict of stream_weights with base_bits, and a missing bitsandbytes."""
    if args.stream_weights and args.base_bits:
        yield "stream_weights and base_bits: got both, expected one: weights of few bits fit; leave one out"
    if args.base_bits and (missing := missing_library()):
        yield missing


def _prefix_problems(args) -> Iterator[str]:
    """Yield settings of cheaper no-grad steps that the method lacks or that have no effect."""
    for name, methods in (("prefix_steps", ENDING), ("rollout_reuse", FIXED)):
        if getattr(args, name) != getattr(RewardGradientConfig, name) and args.method not in methods:
            yield f"{name}: got it with method {args.method}, expected {', '.join(methods)}; change one of the two"
    before = args.num_inference_steps - args.num_grad_steps
    if args.method == "draft_k" and args.prefix_steps is not None and args.prefix_steps >= before:
        yield (
            f"prefix_steps={args.prefix_steps}, but only {before} of num_inference_steps={args.num_inference_steps} "
            "come before the window; lower it"
        )
    if args.method == "draft_k" and args.rollout_reuse > 1 and before < 1:
        yield (
            f"rollout_reuse: got it with {before} of num_inference_steps={args.num_inference_steps} before the window, "
            "expected at least 1; lower num_grad_steps, or leave it out"
        )
    if args.rollout_reuse > 1 and args.drift_weight:
        yield "rollout_reuse: got drift_weight, which needs the states of every rollout, expected 0; leave one out"
    if args.guidance_together and args.guidance_scale <= 1:
        yield f"guidance_together: got it with guidance_scale {args.guidance_scale}, which has one branch; leave it out"
