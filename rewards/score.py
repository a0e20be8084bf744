"""Score files with rewards: `python -m rewards.score --reward flicker video.mp4`.

Takes any number of rewards (repeat --reward) and of files: mp4, gif, png, jpg and others, or
folders of numbered pictures with --fps. A file that can't be scored is named at the end, and the
others are scored. Exit status 1 then, and on any other error.
"""

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rewards.catalogue import CATALOGUE
from rewards.cli.files import check_file, read_video
from rewards.cli.flags import add_reading_flags, device, file_to_write, mapping
from rewards.cli.table import format_table
from rewards.contract import RewardError, frames_needed, refuse_latents, reward_name, split_spec
from rewards.load import load_reward
from rewards.mix import RewardMix
from rlhf.types import Prompt


class NotScoredError(ValueError):
    """A file that can't be scored, while others may."""


def parse_score_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m rewards.score", description=__doc__, formatter_class=formatter)
    parser.add_argument("files", nargs="+", help="videos, images, or folders of numbered pictures")
    parser.add_argument(
        "--reward", action="append", required=True, dest="rewards", help="name or spec; may be repeated"
    )
    parser.add_argument("--prompt", action="append", dest="prompts", help="one for all files, or one for each")
    rows = "further fields of the prompt's row: {field: value}; one for all files, or one for each"
    parser.add_argument("--row", type=mapping, action="append", dest="rows", help=rows)
    parser.add_argument("--kwargs", type=mapping, default={}, help="arguments of rewards: {name: {argument: value}}")
    parser.add_argument("--device", type=device, default="cpu", help="where the rewards run; default cpu")
    add_reading_flags(parser)
    parser.add_argument("--json", type=file_to_write, help="also write the scores to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print a table with a row for each file and return the exit status."""
    arguments = parse_score_args(argv)
    try:
        files = [Path(path).expanduser() for path in arguments.files]
        prompts = resolve_prompts(files, arguments.prompts, arguments.rewards)
        fields = one_for_each("--row", arguments.rows or [{}], len(files))
        prompts = [Prompt(*pair) for pair in zip(prompts, fields, strict=True)]
        pairs = [*zip(files, prompts, strict=True)]
        checked = [_try(_check, *pair, arguments) for pair in pairs]
        rewards = {} if all(checked) else load_rewards(arguments.rewards, arguments.kwargs)
        make_row = partial(score, rewards)
        rows = [row or _try(make_row, *pair, arguments) for row, pair in zip(checked, pairs, strict=True)]
    except (ValueError, OSError) as error:  # RewardError is a ValueError
        print(f"rewards.score: {error}", file=sys.stderr)
        return 1
    scored, failed = ([row for row in rows if ("error" in row) == bad] for bad in (False, True))
    if scored:
        print(format_table([("file", "frames", *rewards), *(_cells(row) for row in scored)]))
    try:
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    except OSError as error:  # such as a full disk
        print(f"rewards.score: --json: got {error}, expected room for a file; name another place", file=sys.stderr)
        return 1
    for row in scored:
        if row["missing"]:
            print(f"rewards.score: {row['file']}: scored {row['missing']}", file=sys.stderr)
    print_failures("rewards.score", [row["error"] for row in failed], len(rows))
    return 1 if failed else 0


def print_failures(command: str, errors: list[str], total: int) -> None:
    """Print why files were not scored, and how many of several."""
    for error in errors:
        print(f"{command}: {error}", file=sys.stderr)
    if errors and total > 1:
        print(f"{command}: {len(errors)} of {total} files were not scored", file=sys.stderr)


def load_rewards(specs: list[str], kwargs: dict) -> dict[str, Callable]:
    """Load rewards by short name. Raises ValueError for repeated names and kwargs of no reward."""
    specs = by_name(specs)
    for name, given in kwargs.items():
        if name not in specs or not isinstance(given, dict):
            expected = f"{{name: {{argument: value}}}} for {', '.join(specs)}"
            raise ValueError(f"--kwargs: got {name!r}: {given!r}, expected {expected}; correct it")
    rewards = {name: load_reward(spec, **kwargs.get(name, {})) for name, spec in specs.items()}
    for name, reward in rewards.items():
        refuse_latents(name, reward, "score with it in a run, by reward_funcs or eval_reward_funcs")
    return rewards


def by_name(specs: list[str]) -> dict[str, str]:
    """Return {short name: spec}. Raises ValueError for a name given twice."""
    names = [reward_name(spec) for spec in specs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        cure = f"leave one out, or name one: other={twice}"
        raise ValueError(f"--reward: got {twice!r} twice, expected each name once; {cure}")
    return dict(zip(names, specs, strict=True))


def resolve_prompts(files: list[Path], prompts: list[str] | None, specs: list[str]) -> list[str]:
    """Return a prompt for each file.

    Raises ValueError unless there are one or as many prompts as files; RewardError if a reward
    needs a missing prompt.
    """
    if not prompts and (reader := prompt_reader(specs)):
        raise RewardError(reader, got="no prompt", expected="a description of the file", cure='add --prompt "..."')
    return one_for_each("--prompt", prompts or [""], len(files))


def prompt_reader(specs: list[str]) -> str | None:
    """Return the name of the first built-in reward that reads the prompt, None if none does."""
    names = [split_spec(spec)[1] for spec in specs]
    return next((name for name in names if name in CATALOGUE and "prompt" in CATALOGUE[name].input), None)


def one_for_each(flag: str, values: list, count: int) -> list:
    """Return a value of the flag for each of `count` files; raise ValueError for another number."""
    if len(values) not in (1, count):
        raise ValueError(f"{flag}: got {len(values)}, expected 1 or {count}, as many as files; correct them")
    return values * count if len(values) == 1 else values


def _check(path: Path, prompt: str, arguments: argparse.Namespace) -> dict:
    """Return {}. Raises NotScoredError for a file that is absent or of another kind."""
    try:
        check_file(path, arguments.fps)
    except ValueError as error:
        raise NotScoredError(str(error)) from error
    return {}


def _try(make_row: Callable, path: Path, prompt: str, arguments: argparse.Namespace) -> dict:
    """Return the row that is made, or {"file", "prompt", "error"}."""
    try:
        return make_row(path, prompt, arguments)
    except NotScoredError as error:
        if arguments.strict:
            raise
        return {"file": str(path), "prompt": prompt, "error": str(error)}


def score(rewards: dict, path: Path, prompt: str, arguments: argparse.Namespace) -> dict:
    """Return {"file", "prompt", "frames", "fps", "missing", "scores": {name: number}} of one file.

    arguments holds device, max_frames, fps and allow_truncated. Raises NotScoredError, naming the
    file.
    """
    mix = RewardMix(rewards, [0.0] * len(rewards)).to(arguments.device)  # weight 0: no gradient
    wanted = None if mix.frames == "all" else frames_needed(mix, sys.maxsize)
    limits = [limit for limit in (wanted, arguments.max_frames) if limit]
    try:
        video = read_video(path, min(limits, default=None), arguments.fps, arguments.allow_truncated)
        info = {"seed": 0, "step": 0} | video.info
        _, scores = mix(video.pixels_BCTHW.to(arguments.device), [prompt], **info)
    except (ValueError, OSError) as error:
        raise NotScoredError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    values = {name: scores_B.item() for name, scores_B in scores.items()}
    row = {"file": str(path), "prompt": prompt, "frames": video.pixels_BCTHW.shape[2]}
    return row | {"fps": video.info.get("fps"), "missing": video.missing, "scores": values}


def _cells(row: dict) -> tuple[str, ...]:
    """Return a file's row of the table: name, frames and scores."""
    return (row["file"], str(row["frames"]), *(f"{value:.5g}" for value in row["scores"].values()))


if __name__ == "__main__":
    sys.exit(main())
