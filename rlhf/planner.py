"""What a run needs, computed from its settings and the sizes of the model alone. Nothing here is measured."""

import torch

from rlhf.checks import model_card, with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.memory_plan import plan_memory

GIB = 2**30
SMALL_MODEL = 1e9  # parameters; above that the loader chooses bfloat16


def describe(args: RewardGradientConfig) -> str:
    """The resolved settings as YAML, then sizes and the memory of the weights, each computed and labelled so."""
    card = model_card(args.model)
    args = with_sampling(args, card["sampling"])
    return f"{args.to_yaml()}\n{sizes(args, card)}"


def sizes(args: RewardGradientConfig, card: dict[str, dict]) -> str:
    """Latents, tokens, parameters and the memory that weights and optimizer hold, as text."""
    transformer, vae, adapter = count_parameters(args, card)
    bytes_each = 4 if args.dtype == "float32" or (args.dtype == "auto" and transformer < SMALL_MODEL) else 2
    every, down = 2 ** sum(card["vae"]["temperal_downsample"]), 2 ** len(card["vae"]["temperal_downsample"])
    patch = card["transformer"]["patch_size"]
    latent = (1 + (args.num_frames - 1) // every, args.height // down, args.width // down)
    tokens = latent[0] * (latent[1] // patch) * (latent[2] // patch)
    forward, with_gradient = forwards(args)
    copy = bytes_each if bytes_each < 4 else 0  # of the masters, in the base's format
    of_vae = 2 if args.vae_dtype == "bfloat16" else 4
    rows = [
        ("latents (channels, frames, height, width)", f"{(card['transformer']['in_channels'], *latent)}"),
        ("video tokens", f"{tokens:,}"),
        ("transformer forwards a step and video", f"{forward}"),
        ("of these with gradient, at most", f"{with_gradient}"),
        ("transformer weights", f"{transformer:,} parameters, {_gib(transformer * bytes_each)}"),
        ("VAE weights", f"{vae:,} parameters, {_gib(vae * of_vae)}"),
        ("adapter with masters, gradient, two moments", f"{adapter:,} parameters, {_gib(adapter * (16 + copy))}"),
        *_activations(args, card, bytes_each, vae * of_vae + adapter * (16 + copy)),
    ]
    lines = [f"  {name.ljust(max(len(row[0]) for row in rows))}  {value}" for name, value in rows]
    return "\n".join(
        [
            "Computed from the sizes, not measured. Left out: text encoders (they leave the device when the prompts",
            "are encoded), reward models, gradients in flight.",
            *lines,
        ]
    )


def _activations(args: RewardGradientConfig, card: dict[str, dict], bytes_each: int, held: int) -> list[tuple]:
    """Rows about what waits for the backward pass, for a reward of the first frame and of all; held: bytes besides."""
    one, whole = (plan_memory(args, card, frames, bytes_each) for frames in (1, args.num_frames))
    return [
        ("kept by one guidance branch of one step", _gib(one.branch)),
        ("and by a block that is recomputed", _gib(one.block)),
        ("kept by all steps with gradient at once", _gib(one.window or one.branch)),
        ("kept by the decoder: first frame, all frames", f"{_gib(one.decoder)}, {_gib(whole.decoder)}"),
        ("at most at a time: first frame, all frames", f"{_gib(one.most + held)}, {_gib(whole.most + held)}"),
    ]


def forwards(args: RewardGradientConfig) -> tuple[int, int]:
    """Forwards of the transformer for one video and optimizer step, and how many of them carry gradient, at most.

    args has all sampling keys set.
    """
    steps, again = args.num_inference_steps, args.num_draws if args.method in ("draft_lv", "srpo") else 0
    of_rollout = {"listed": len(args.grad_steps or []), "refl": 1, "draft_lv": 1, "srpo": 0}
    trained = of_rollout.get(args.method, args.num_grad_steps) + again + bool(args.drift_weight)
    guided = args.guidance_scale > 1
    branches = 2 if guided and args.guidance_gradient != "distill" else 1
    of_base = (2 if guided else 1) * bool(args.drift_weight)
    all_of_them = branches * (steps + again + bool(args.drift_weight)) + of_base
    return all_of_them, (2 if guided and args.guidance_gradient == "full" else 1) * trained


def count_parameters(args: RewardGradientConfig, card: dict[str, dict]) -> tuple[int, int, int]:
    """Parameters of the transformer, the VAE and the adapter, counted on modules without storage."""
    from diffusers import AutoencoderKLWan

    from rlhf.contentv.transformer import SD3Transformer3DModel
    from rlhf.lora import add_adapter, lora_config

    with torch.device("meta"):
        transformer = SD3Transformer3DModel.from_config(card["transformer"])
        vae = AutoencoderKLWan.from_config(card["vae"])
        base = _count(transformer.parameters())
        add_adapter(transformer, lora_config(args), args.seed, args.train_blocks)
    return base, _count(vae.parameters()), _count(p for p in transformer.parameters() if p.requires_grad)


def _count(parameters) -> int:
    return sum(p.numel() for p in parameters)


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
