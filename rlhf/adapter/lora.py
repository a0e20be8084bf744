"""The LoRA adapter, by peft: describe it, add it to the transformer, switch it off."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftConfig

from rlhf.config import RewardGradientConfig

# The projections of SD3's joint attention: of the video's tokens, and of the text's.
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LAYER_SETS = {"attention": ATTENTION, "all-linear": [*ATTENTION, "net.0.proj", "net.2"]}  # net: of a feed-forward layer


def target_layers(names: list[str] | None) -> list[str]:
    """Return the ends of the adapted layers' names, with those of `LAYER_SETS` in place of sets."""
    return list(dict.fromkeys(end for name in names or ["attention"] for end in LAYER_SETS.get(name, [name])))


def lora_config(args: RewardGradientConfig) -> LoraConfig:
    """Return the LoRA that the settings describe."""
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_rank if args.lora_alpha is None else args.lora_alpha,
        target_modules=target_layers(args.lora_target_modules),
    )


def lora_settings(config: PeftConfig | None) -> dict:
    """Return the settings that describe a LoRA; {} for None and other adapters."""
    if not isinstance(config, LoraConfig):
        return {}
    layers = config.target_modules
    named = {"lora_target_modules": sorted(layers)} if isinstance(layers, list | set) else {}
    return named | {"lora_rank": config.r, "lora_alpha": config.lora_alpha}


def add_adapter(transformer: torch.nn.Module, config: PeftConfig, seed: int) -> None:
    """Freeze the transformer and add a trainable adapter named "default".

    A is drawn from `seed` on the CPU, so it is the same on every device and process. B is zero, so
    the model's output does not change yet.
    """
    transformer.requires_grad_(False).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(copy.deepcopy(config))  # peft writes the layers that it finds into it


@contextmanager
def disable_adapter(transformer: torch.nn.Module) -> Iterator[None]:
    """Make the transformer the base model while inside; also a decorator of a function."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
