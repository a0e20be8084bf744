"""Runs of a tiny model in one or several processes, one after the other: what test_layout and
others look at.
"""

import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from tiny import tiny_pipeline, tiny_transformer
from tiny_wan import tiny_wan_pipeline, tiny_wan_transformer
from toy_rewards import PROMPTS, brightness, calm, redness

import rlhf.run.checkpoint
import rlhf.trainer
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.config.parse import parse_config
from rlhf.execution import collectives as exchange
from rlhf.execution import ulysses
from rlhf.run.signals import TrainingInterrupted
from rlhf.train import EXIT_INTERRUPTED
from rlhf.trainer import RewardGradientTrainer

SETTINGS = {
    "height": 16,
    "width": 48,
    "num_frames": 5,
    "num_inference_steps": 3,
    "num_grad_steps": 2,
    "guidance_scale": 3.0,
    "max_steps": 5,
    "lora_rank": 4,
    "learning_rate": 3e-4,
    "adam_epsilon": 1e-5,  # rounding of gradients that are almost zero is not to be blown up to a whole step
    "eval_prompts": "none",
    "report_to": "none",
    "cpu_threads": 1,
}


OMISSIONS = {  # by what is left out of a run: where, and what stands there instead
    "sum of latents": (exchange._SumGradient, "backward", staticmethod(lambda ctx, grad: (grad, None, None))),
    "sum of text": (ulysses, "all_gather_sum_grad", exchange.all_gather),
    "sum of adapters": (Accelerator, "reduce", lambda self, tensor, how: tensor),
}


def pipeline():
    """Three heads, which no number of processes here divides."""
    pipe = tiny_pipeline()
    pipe.transformer = tiny_transformer(num_attention_heads=3)
    return pipe


def wan_pipeline(dtype: torch.dtype = torch.float32):
    """Three heads of Wan, with some weights in float32, as the loader keeps them."""
    pipe, transformer = tiny_wan_pipeline(), tiny_wan_transformer(num_attention_heads=3)
    for name, p in transformer.named_parameters():
        if not any(part in name for part in transformer._keep_in_fp32_modules):
            p.data = p.data.to(dtype)
    pipe.register_modules(transformer=transformer)
    return pipe


def broken_on_the_second(video, prompts, **info):
    """Not a number in the third step of process 1."""
    bad = os.environ.get("RANK") == "1" and info["step"] == 2
    return redness(video, prompts) * (float("nan") if bad else 1.0)


def stuck_on_the_second(video, prompts, **info):
    while os.environ.get("RANK") == "1" and info["step"] == 2:
        time.sleep(1)
    return redness(video, prompts)


REWARDS = {"redness": redness, "calm": [redness, calm], "broken": broken_on_the_second, "stuck": stuck_on_the_second}
REWARDS["both"] = [redness, brightness]


def run(output: Path, own: dict) -> dict:
    """One run: the adapter and its gradient over all processes in each step, and more.

    own: settings; "wan": a dtype; "omit" of `OMISSIONS`, "reward" of `REWARDS`, "prompts" and "eval" prompts.
    Their latents are cached beside real videos.
    """
    own = dict(own)
    if "anchor_data" in own:
        own["anchor_data"] = str(output.parent / own["anchor_data"])
        os.environ["CONTENTV_RLHF_CACHE"] = str(output.parent / "cache")
    wan = own.pop("wan", None)
    omit, reward = own.pop("omit", None), REWARDS[own.pop("reward", "redness")]
    prompts, held_out = own.pop("prompts", PROMPTS), own.pop("eval", None)
    prompts = prompts[int(os.environ.get("RANK", 0))] if isinstance(prompts, tuple) else prompts
    args, gradients = RewardGradientConfig(**SETTINGS | {"output_dir": str(output)} | own), []
    clip = rlhf.trainer.clip_gradient

    def clip_and_record(gradient, *limits):
        gradients.append(gradient.clone())
        clip(gradient, *limits)

    with ExitStack() as stack:
        stack.enter_context(mock.patch("rlhf.report.finish_report"))
        stack.enter_context(mock.patch("rlhf.trainer.clip_gradient", clip_and_record))
        if omit:
            stack.enter_context(mock.patch.object(*OMISSIONS[omit]))
        try:
            trainer = RewardGradientTrainer(wan_pipeline(wan) if wan else pipeline(), reward, args, prompts, held_out)
        except ConfigError as error:
            return {"error": str(error)}
        summary = trainer.train()
    parts = [p for p in trainer.pipe.transformer.parameters() if isinstance(p, torch.distributed.tensor.DTensor)]
    return {
        "gradients": gradients,
        "weights": trainer.masters.vector.detach().clone(),
        "summary": summary,
        "layout": str(trainer.layout.sizes),
        "held": sum(p.to_local().numel() for p in parts),
        "whole": sum(p.numel() for p in parts),
    }


def runs(folder: Path, named: dict[str, dict]) -> None:
    """Each of the runs in folder/NAME; what it did goes to folder/NAME-RANK.pt."""
    torch.set_num_threads(1)
    for name, own in named.items():
        torch.save(run(folder / name, own), folder / f"{name}-{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def train(output: Path, own: dict) -> None:
    """One run, as a program: it fails with the run."""
    torch.set_num_threads(1)
    run(output, own)


def slowly_saved(config: Path) -> None:
    """A run by a file of settings, as a program that ends as the command does; saving takes a
    while.
    """
    flush = rlhf.run.checkpoint._flush
    rlhf.run.checkpoint._flush = lambda path: (time.sleep(0.05), flush(path))
    try:
        RewardGradientTrainer(tiny_pipeline(), redness, parse_config(["--config", str(config)]), PROMPTS).train()
    except TrainingInterrupted:
        sys.exit(EXIT_INTERRUPTED)


def bench(arguments: list[str]) -> None:
    """bench/scale.py, as torchrun starts it."""
    from scripts import script

    torch.set_num_threads(1)
    script("bench/scale.py").main(arguments)
