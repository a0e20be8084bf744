"""Runs of several processes, one after the other: run by test_layout. Arguments: a folder, and the runs' names.

NAME.yaml are a run's settings; NAME.pt gets what it did, from the first process.
"""

import sys
from pathlib import Path

import torch
from conftest import PROMPTS, redness
from tiny import tiny_pipeline, tiny_transformer

import rlhf.trainer
from rlhf import exchange
from rlhf.parse import parse_config
from rlhf.trainer import RewardGradientTrainer

OMITTED = {  # by the end of a run's name: what is left out of it
    "no sum of latents' gradients": lambda patch: patch(exchange._SumGradient, "backward", _own_gradient),
    "no sum of text's gradients": lambda patch: patch(exchange._Gather, "backward", _own_part),
    "no sum of adapters' gradients": lambda patch: patch(rlhf.trainer.Accelerator, "reduce", lambda _, x, how: x),
}


def _own_gradient(ctx, grad):
    return grad, None, None


def _own_part(ctx, grad):
    return grad[torch.distributed.get_rank(ctx.group)].contiguous(), None, None


def pipeline():
    """Three heads: no number of processes here divides them."""
    pipe = tiny_pipeline()
    pipe.transformer = tiny_transformer(num_attention_heads=3)
    return pipe


def record(args) -> dict:
    """The adapter and its gradient, over all processes, in each step of a run."""
    gradients, weights = [], []
    clip = rlhf.trainer.clip_gradient

    def clip_and_record(gradient, *limits):
        gradients.append(gradient.clone())
        clip(gradient, *limits)

    rlhf.trainer.clip_gradient, rlhf.trainer.finish_report = clip_and_record, lambda folder: None
    trainer = RewardGradientTrainer(pipeline(), redness, args, PROMPTS, PROMPTS[:3])
    weights.append(trainer.masters.vector.detach().clone())
    summary = trainer.train()
    weights.append(trainer.masters.vector.detach().clone())
    rlhf.trainer.clip_gradient = clip
    return {"gradients": gradients, "weights": weights, "summary": summary, "sizes": str(trainer.layout.sizes)}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        args = parse_config(["--config", str(folder / f"{name}.yaml")])
        kept = []

        def patch(where, what, instead, kept=kept):
            kept.append((where, what, where.__dict__[what]))
            setattr(where, what, staticmethod(instead) if isinstance(kept[-1][2], staticmethod) else instead)

        for omission, leave_out in OMITTED.items():
            if name.endswith(omission):
                leave_out(patch)
        found = record(args)
        for where, what, before in kept:
            setattr(where, what, before)
        if int(__import__("os").environ.get("RANK", 0)) == 0:
            torch.save(found, folder / f"{name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])
