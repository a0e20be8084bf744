"""What do rewards say of files? `python -m rewards.score --reward hps_v2_1 video.mp4 --prompt "a red kite"`.

Any number of rewards (--reward again) and of files: mp4, gif, png, jpg and others. Exit status 1 where something is
missing.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from rewards.base import RewardError, frames_needed
from rewards.catalogue import CATALOGUE
from rewards.cli.table import format_table
from rewards.flags import device, file_to_write, frame_count, mapping
from rewards.load import load_reward, name_in
from rewards.mix import RewardMix
from rewards.read import check_file, read_video


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m rewards.score", description=__doc__, formatter_class=formatter)
    parser.add_argument("files", nargs="+", help="videos or images")
    parser.add_argument(
        "--reward", action="append", required=True, dest="rewards", help="name or spec; may be repeated"
    )
    parser.add_argument("--prompt", action="append", dest="prompts", help="one for all files, or one for each")
    parser.add_argument("--kwargs", type=mapping, default={}, help="arguments of rewards: {name: {argument: ..}}")
    parser.add_argument("--device", type=device, default="cpu")
    parser.add_argument("--max_frames", type=frame_count, help="score the leading frames only, for long videos")
    parser.add_argument("--json", type=file_to_write, help="write the scores to this file too")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print a table, a row for each file; return the exit status."""
    arguments = parse_arguments(argv)
    try:
        files = [check_file(path) for path in arguments.files]
        prompts = prompts_of(files, arguments.prompts, arguments.rewards)
        rewards = load_rewards(arguments.rewards, arguments.kwargs)
        rows = [score(rewards, *pair, arguments) for pair in zip(files, prompts, strict=True)]
    except (ValueError, OSError) as error:  # RewardError is the first
        print(f"rewards.score: {error}", file=sys.stderr)
        return 1
    print(format_table([("file", "frames", *rewards), *(_cells(row) for row in rows)]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


def load_rewards(specs: list[str], kwargs: dict) -> dict[str, Callable]:
    """Rewards by short name. ValueError for arguments that belong to none of them, and for a name that two have."""
    specs = by_name(specs)
    for name, given in kwargs.items():
        if name not in specs or not isinstance(given, dict):
            expected = f"{{name: {{argument: value}}}} for {', '.join(specs)}"
            raise ValueError(f"--kwargs: got {name!r}: {given!r}, expected {expected}; correct it")
    return {name: load_reward(spec, **kwargs.get(name, {})) for name, spec in specs.items()}


def by_name(specs: list[str]) -> dict[str, str]:
    """{short name: spec}. ValueError for a name that two have, of which only one would be scored."""
    names = [name_in(spec) for spec in specs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        cure = "leave one out, or rename the class or function"
        raise ValueError(f"--reward: got {twice!r} twice, expected each name once; {cure}")
    return dict(zip(names, specs, strict=True))


def prompts_of(files: list[Path], prompts: list[str] | None, specs: list[str]) -> list[str]:
    """A prompt for each file. ValueError if there are neither one nor as many, or none where a reward wants them."""
    reads = next((spec for spec in specs if spec in CATALOGUE and "prompt" in CATALOGUE[spec].input), None)
    if not prompts and reads:
        raise RewardError(reads, got="no prompt", expected="what the file is to show", cure='add --prompt "..."')
    if prompts and len(prompts) not in (1, len(files)):
        raise ValueError(f"--prompt: got {len(prompts)}, expected 1 or {len(files)}, as many as files; correct them")
    return (prompts or [""]) * (len(files) if not prompts or len(prompts) == 1 else 1)


def score(rewards: dict, path: Path, prompt: str, arguments: argparse.Namespace) -> dict:
    """{"file", "prompt", "frames", "fps", "scores": {name: number}} of one file."""
    mix = RewardMix(rewards, [0.0] * len(rewards)).to(arguments.device)  # of weight 0: without gradient
    wanted = None if mix.frames == "all" else frames_needed(mix, sys.maxsize)
    limits = [limit for limit in (wanted, arguments.max_frames) if limit]
    video_BCTHW, fps = read_video(path, min(limits, default=None))
    info = {"seed": 0, "step": 0} | ({} if fps is None else {"fps": fps})
    _, scores = mix(video_BCTHW.to(arguments.device), [prompt], **info)
    values = {name: scores_B.item() for name, scores_B in scores.items()}
    return {"file": str(path), "prompt": prompt, "frames": video_BCTHW.shape[2], "fps": fps, "scores": values}


def _cells(row: dict) -> tuple[str, ...]:
    return (row["file"], str(row["frames"]), *(f"{value:.5g}" for value in row["scores"].values()))


if __name__ == "__main__":
    sys.exit(main())
