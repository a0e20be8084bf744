"""Check the settings of the method and the adapter against the others and the model."""

import difflib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.io import run_of_checkpoint
from rlhf.method.options import SCORES_ALONE, MethodOptions, is_offline, read_options
from rlhf.run.checkpoint import find_checkpoint

if TYPE_CHECKING:  # importing it takes seconds
    from rlhf.adapter.lora_weights import Lora

PLAIN_LORA = (
    "expected plain LoRA, since no adapter file holds the sum of a DoRA and another adapter; merge it "
    "(python -m rlhf.export RUN --merged OUT), and name OUT as model"
)
# Elsewhere num_grad_steps keeps its default, so that it is never silently without effect.
WITH_NUM_GRAD_STEPS = ("draft_k", "alignprop", "uniform", "drtune")


def method_problems(args: RewardGradientConfig) -> Iterator[str]:
    """Yield problems of the method with its options, the number of steps, group, videos and drift.

    args has all sampling keys set.
    """
    if args.num_grad_steps != 1 and args.method not in WITH_NUM_GRAD_STEPS:
        yield (
            f"num_grad_steps: got {args.num_grad_steps} with method {args.method}, which does not read it; expected 1, "
            f"or method {' or '.join(WITH_NUM_GRAD_STEPS)}; change one of the two"
        )
    offline = False
    try:
        options = read_options(args.method, args.method_kwargs)
    except ConfigError as error:
        yield from error.problems
    else:
        yield from _step_problems(args, options)
        yield from _group_problems(args, options)
        yield from _data_problems(args, options)
        yield from _negative_drift_problems(args, options)
        offline = is_offline(args)
    yield from _drift_problems(args, offline)


def _step_problems(args, options: MethodOptions) -> Iterator[str]:
    """Yield numbers of steps that exceed num_inference_steps or that the method cannot use.

    Also settings that flow_grpo and adjoint_matching cannot have.
    """
    steps, early = args.num_inference_steps, getattr(options, "jump_steps", None) or 1
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
        yield f"method_kwargs: jump_steps={early} exceeds num_inference_steps={steps}, expected at most that; lower it"
    elif args.method == "drtune" and args.num_grad_steps > steps - early + 1:
        yield (
            f"num_grad_steps={args.num_grad_steps} and jump_steps={early} leave too few steps: a rollout may jump to "
            f"x0 after {steps - early + 1} of num_inference_steps={steps}; lower one of the first two"
        )
    two_steps = {"leap_align": "it leaps twice", "flow_grpo": "its last step has no noise to learn from"}
    if args.method in two_steps and steps < 2:
        expected = f"expected at least 2, since {two_steps[args.method]}"
        yield f"num_inference_steps: got {steps} with method {args.method}, {expected}; raise it"
    if (visited := getattr(options, "adjoint_steps", None) or 1) > steps:
        got = f"adjoint_steps={visited} exceeds num_inference_steps={steps}"
        yield f"method_kwargs: {got}, expected at most that; lower it"
    if (drawn := getattr(options, "drawn_steps", None) or 1) > steps:
        got = f"drawn_steps={drawn} exceeds num_inference_steps={steps}"
        yield f"method_kwargs: {got}, expected at most that; lower it"
    if args.method == "adjoint_matching" and args.drift_weight:
        expected = "expected 0: reward_scale already weighs the distance from the base"
        yield f"drift_weight: got {args.drift_weight} with method adjoint_matching, {expected}; leave it out"
    if args.method == "listed":
        listed = options.steps or []
        if not listed or len(set(listed)) < len(listed) or not all(0 <= i < steps for i in listed):
            expected = f"expected different steps of 0 to {steps - 1}, at least one"
            yield f"method_kwargs: steps: got {options.steps} with method listed, {expected}; correct them"


def _group_problems(args, options: MethodOptions) -> Iterator[str]:
    """Yield problems of group size and num_levels, and settings that `SCORES_ALONE` ignore."""
    size, group, levels = args.per_device_train_batch_size, getattr(options, "group_size", 1), args.num_inference_steps
    if size % group:
        yield (
            f"per_device_train_batch_size: got {size} with method {args.method}, which compares {group} videos of each "
            "prompt, expected a multiple of that; change it, or group_size in method_kwargs"
        )
    if getattr(options, "num_levels", 1) > levels:
        expected = f"expected at most num_inference_steps={levels}"
        yield f"method_kwargs: num_levels: got {options.num_levels}, {expected}; lower it"
    if args.method not in SCORES_ALONE:
        return
    unread = ((args, "balance_reward_gradients"), (args, "drift_weight"))
    for given, name in (*unread, (options, "reward_perturbation")):
        got, default = getattr(given, name), getattr(type(given), name)
        if got != default:
            expected = f"expected {default}"
            yield f"{name}: got {got} with method {args.method}, which does not read it, {expected}; leave it out"


def _data_problems(args, options: MethodOptions) -> Iterator[str]:
    """Yield settings of real videos without anchor_data, the reverse, and what cannot join."""
    offline = getattr(options, "offline", False)
    for name in ("anchor_data_steps", "offline"):
        if getattr(options, name, 0) and args.anchor_data is None:
            yield f"method_kwargs: {name}: got it without anchor_data, expected a folder of real videos; set that, too"
    if args.anchor_data and not (offline or options.anchor_data_steps):
        expected = "expected anchor_data_steps, or offline of method srpo, in method_kwargs"
        yield f"anchor_data: got {args.anchor_data}, which nothing reads, {expected}; set one, or leave it out"
    default = MethodOptions.anchor_data_weight
    if options.anchor_data_weight != default and not options.anchor_data_steps:
        got = f"anchor_data_weight: got {options.anchor_data_weight} without anchor_data_steps, on which it builds"
        yield f"method_kwargs: {got}, expected {default}; set both, or leave it out"
    if options.anchor_data_steps and args.guidance_gradient == "distill":
        expected = "expected full, text or none: real videos would teach the adapter to do without guidance"
        yield f"guidance_gradient: got distill with anchor_data_steps, {expected}; change one of the two"
    if offline and args.drift_weight:
        yield f"drift_weight: got {args.drift_weight} with offline, which has no rollout, expected 0.0; leave it out"


def _negative_drift_problems(args, options: MethodOptions) -> Iterator[str]:
    """Yield what the drift of the negative branch alone cannot go with."""
    if not options.negative_drift_weight:
        return
    has_no_rollout = getattr(options, "offline", False) or args.method in (*SCORES_ALONE, "adjoint_matching")
    without_guidance = args.guidance_scale is not None and args.guidance_scale <= 1
    refused = {
        "drift_weight": (args.drift_weight > 0, "a step measures one drift; set one of the two to 0"),
        "anchor_steps": (args.anchor_steps > 0, "their loss is of the guided velocity; leave one of the two out"),
        "rollout_reuse": (args.rollout_reuse > 1, "it needs the states of every rollout; leave one of the two out"),
        "guidance_scale": (without_guidance, "there is no negative branch; set that above 1, or leave this out"),
        "guidance_gradient": (args.guidance_gradient == "distill", "the adapter has no negative branch; leave it out"),
        "method": (has_no_rollout, "it has no reward's gradient through a rollout to go beside; leave it out"),
    }
    for name, (is_refused, why) in refused.items():
        if is_refused:
            got = f"got {options.negative_drift_weight} with {name} {getattr(args, name)}"
            yield f"method_kwargs: negative_drift_weight: {got}, expected 0.0, for {why}"


def _drift_problems(args, offline: bool) -> Iterator[str]:
    """Yield distillation without drift or without guidance, and anchor_steps of 1."""
    if args.guidance_gradient == "distill" and (offline or args.method in (*SCORES_ALONE, "adjoint_matching")):
        yield (
            f"guidance_gradient: got distill with method {args.method}{' offline' * offline}, which has no "
            "drift_weight to teach guidance, expected full, text or none; change one of the two"
        )
    elif args.guidance_gradient == "distill" and not args.drift_weight:
        yield (
            "guidance_gradient: got distill with drift_weight 0, which would teach the adapter no guidance; set "
            "drift_weight above 0"
        )
    if args.guidance_gradient == "distill" and args.guidance_scale <= 1:
        yield f"guidance_scale: got {args.guidance_scale} with distill, expected above 1: there is no guidance to teach"
    if args.anchor_steps == 1:
        yield "anchor_steps: got 1, which leaves no step for the reward, expected 0 or at least 2; raise it"


def adapter_problems(args: RewardGradientConfig, transformer: dict) -> Iterator[str]:
    """Yield a problem for each adapted layer that the model lacks. transformer: its config."""
    if not args.lora_target_modules:
        return
    from rlhf.adapter.lora import LAYER_SETS  # takes seconds to import
    from rlhf.generator.loading import linear_sizes

    layers = list(linear_sizes(transformer))
    ends = {name.split("blocks.")[-1].split(".", 1)[-1] for name in layers}  # to_q of transformer_blocks.3.attn.to_q
    ends |= {end.split(".", 1)[-1] for end in ends}
    for target in args.lora_target_modules:
        if target not in LAYER_SETS and not any(f".{name}".endswith(f".{target}") for name in layers):
            near = difflib.get_close_matches(target, [*LAYER_SETS, *ends], n=1, cutoff=0.4)
            cure = f"did you mean {near[0]!r}?" if near else "correct it"
            expected = f"expected the end of a linear layer's name such as to_q, or {' or '.join(LAYER_SETS)}"
            yield f"lora_target_modules: got {target!r}, {expected}; {cure}"


def read_initial(args: RewardGradientConfig, transformer: dict) -> "Lora | None":
    """Return the LoRA that a run starts from, None without one. transformer: the model's config.

    A resumed run reads the copy in the folder of the run that its checkpoint is of. Raises
    ValueError, also for DoRA.
    """
    if not args.initial_adapter:
        return None
    from rlhf.adapter.lora_file import INITIAL_KEY, read_lora_for  # takes seconds to import

    source = args.initial_adapter
    if args.resume_from_checkpoint:
        checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir, quiet=True)
        source = run_of_checkpoint(checkpoint) / INITIAL_KEY
    lora = read_lora_for(transformer, source)
    if lora.has_magnitudes:
        raise ValueError(f"got a DoRA, {source}, {PLAIN_LORA}")
    return lora
