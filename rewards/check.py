"""Check a reward against the contract: `python -m rewards.check SPEC`; status 1 on failure."""

import argparse
import sys
from functools import partial

import torch

from rewards.cli.flags import device, mapping
from rewards.contract import check_generator, scores_latents
from rewards.contract_probe import PROBE_PROMPTS, probe
from rewards.load import load_reward
from rlhf.generator.files import latent_sizes, model_sizes, transformer_digest
from rlhf.generator.registry import DEFAULT_MODEL
from rlhf.types import Prompt


def parse_check_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the command."""
    parser = argparse.ArgumentParser(prog="python -m rewards.check", description=__doc__)
    parser.add_argument("spec", help="built-in name, path/to/file.py:Class, package.module:Class or an entry point")
    parser.add_argument("--shape", type=_shape, default=(3, 17, 64, 64), help="C,T,H,W of a video (3,17,64,64)")
    parser.add_argument("--kwargs", type=mapping, default={}, help="arguments of the reward, for example '{frames: 8}'")
    model = (
        f"generator of the latents that a reward of latents gets: nano, a folder or a hub id; default {DEFAULT_MODEL}"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help=model)
    parser.add_argument("--device", type=device, default="cpu", help="where the reward runs; default cpu")
    parser.add_argument("--prompt", action="append", dest="prompts", help="a prompt of the test; may be repeated")
    row = "further fields of the prompts' row: {field: value}"
    parser.add_argument("--row", type=mapping, default={}, help=row)
    return parser.parse_args(argv)


def _shape(text: str) -> tuple[int, ...]:
    """Parse the flag C,T,H,W: four numbers above 0."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected four numbers C,T,H,W, for example 3,17,64,64")
    return tuple(int(part) for part in parts)


def main(argv: list[str] | None = None) -> int:
    """Print one line for each check and return the exit status."""
    arguments = parse_check_args(argv)
    print(f"reward {arguments.spec}, video {'x'.join(map(str, arguments.shape))} (C, T, H, W), {arguments.device}")
    try:
        reward = load_reward(arguments.spec, **arguments.kwargs)
        if isinstance(reward, torch.nn.Module):
            reward.to(arguments.device)
        _print_check("pass", "loaded")
        check_generator(arguments.spec, reward, arguments.model, partial(transformer_digest, arguments.model))
        report = probe(
            reward,
            arguments.shape,
            [Prompt(prompt, arguments.row) for prompt in arguments.prompts or PROBE_PROMPTS],
            arguments.device,
            name=arguments.spec,
            on_pass=lambda line: _print_check("pass", line),
            latents=latent_sizes(model_sizes(arguments.model)) if scores_latents(reward) else None,
        )
    except ValueError as error:  # RewardError is one
        _print_check("FAIL", str(error))
        return 1
    print(f"The reward keeps the contract ({report.seconds:.2f} s).")
    return 0


def _print_check(verdict: str, line: str) -> None:
    """Print one line of the list of checks."""
    print(f"  {verdict}  {line}")


if __name__ == "__main__":
    sys.exit(main())
