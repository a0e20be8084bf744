"""Score videos with rewards, of this model or of another.

    python eval/score.py videos/base videos/tuned --reward nano_verifier --reward nano_clip
    python eval/score.py other/videos --names_are_prompts --reward hps_v2_1 --device cuda

The prompts of a folder are in videos.jsonl ({"file", "prompt"} a line, as eval/generate.py writes
it, and further fields, which rewards read), in the prompts.txt of a run's samples, or in file names
such as `a red kite-0.mp4`. A folder of numbered pictures is a video, with --fps. Writes
scores.jsonl beside the videos. Scores are cached by file content, so nothing is scored twice and a
second start resumes. With `accelerate launch` all devices share the work. Videos that can't be
scored are named at the end, with exit status 1. Any other error has status 2.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from rewards.cli.files import check_file
from rewards.cli.flags import add_reading_flags, mapping
from rewards.cli.table import format_table
from rewards.contract import RewardError
from rewards.score import NotScoredError, print_failures, prompt_reader
from rewards.score_cache import ScoreCache, Scorer, content_sha256, default_cache_folder
from rlhf.evaluation.video_set import MANIFEST, SCORES, Video, read_set, relative_name, require_files
from rlhf.io import file_errors, read_rows, write_rows
from rlhf.types import fields_of


def parse_score_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/score.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("folders", nargs="+", type=Path, help="folders of videos")
    parser.add_argument("--reward", action="append", required=True, dest="rewards", help="name or spec; repeatable")
    parser.add_argument("--kwargs", type=mapping, default={}, help="arguments of rewards: {name: {argument: value}}")
    parser.add_argument("--names_are_prompts", action="store_true", help="take the prompts from the file names")
    add_reading_flags(parser)
    add_scoring_flags(parser)
    return parser.parse_args(argv)


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of device and cache, which eval/vbench.py has, too."""
    parser.add_argument("--device", help="kind of device (default: what the machine has)")
    cache = "folder of cached scores (default: ~/.cache/contentv-rlhf/scores)"
    parser.add_argument("--cache", type=Path, help=cache)


def score_all(videos: list[Video], scorer: Scorer, accelerator, strict: bool = True) -> list[dict]:
    """Return a row of each video; all processes share the work through the cache.

    A row is that of the scorer, or {"error": why} of a video that can't be scored. strict: raise
    NotScoredError in its place.
    """
    from rlhf.run.metrics import progress_bar

    own = videos[accelerator.process_index :: accelerator.num_processes]
    with progress_bar("score", "video", len(own), accelerator.is_main_process) as bar:
        for video in own:
            _try_score(video, scorer, strict)
            bar.update()
    accelerator.wait_for_everyone()
    return [_try_score(video, scorer, strict) for video in videos] if accelerator.is_main_process else []


def _try_score(video: Video, scorer: Scorer, strict: bool) -> dict:
    try:
        return scorer(video.path, video.prompt)
    except NotScoredError as error:
        if strict:
            raise
        return {"error": str(error)}


def checked_set(folder: Path, args: argparse.Namespace) -> list[Video]:
    """Return the videos of a folder. Raise ValueError if a file or a needed prompt is missing."""
    videos = read_set(folder, args.names_are_prompts, with_folders=args.fps is not None)
    require_files(videos)
    for video in videos:
        check_file(video.path, args.fps)
        if not video.prompt.strip() and (reader := prompt_reader(args.rewards)):
            got, cure = f"no prompt of {video.path}", f"write one into {folder / MANIFEST}"
            raise RewardError(reader, got=got, expected="text that says what it shows", cure=cure)
    return videos


def write_scores(folder: Path, videos: list[Video], scored: list[dict], conditions: dict[str, dict]) -> None:
    """Write scores.jsonl, {"file", "sha256", "prompt", "seed", "category", "row", "scores"}.

    Scores by other rewards stay, for files that have not changed. A video that was not scored has
    an "error", one that was cut short says what is "missing". conditions: of `score_conditions`, by
    reward, which scored rows have, too.
    """
    path, old = folder / SCORES, {}
    if path.is_file():
        known = read_rows(path)
        with file_errors(path):
            old = {_identity(row): (row["scores"], row.get("conditions", {})) for row in known}
    rows = []
    for video, new in zip(videos, scored, strict=True):
        row = {"file": relative_name(folder, video.path), "sha256": None, "prompt": video.prompt}
        row |= {"seed": video.seed, "category": video.category, "row": fields_of(video.prompt)}
        if "error" not in new:
            row["sha256"] = content_sha256(video.path)
            scores, before = old.get(_identity(row), ({}, {}))
            new = new | {"scores": scores | new["scores"], "conditions": before | conditions}
        rows.append(row | {"scores": {}} | new)
    write_rows(path, rows)


def _identity(row: dict) -> tuple:
    """Return what the scores of a line of scores.jsonl depend on."""
    return row["file"], row["sha256"], row["prompt"], json.dumps(row.get("row", {}), sort_keys=True)


def open_processes(args: argparse.Namespace):
    """Return the accelerator of the processes that share the work."""
    from rlhf.config import RewardGradientConfig
    from rlhf.distributed.accelerator import make_accelerator

    return make_accelerator(RewardGradientConfig(device=args.device, report_to=[]))


def open_scorer(args: argparse.Namespace, accelerator, rewards: list[str], kwargs: dict, **reading) -> Scorer:
    """Return the scorer of the rewards on this process's device, with its cache."""
    cache = ScoreCache(args.cache or default_cache_folder())
    return Scorer(rewards, kwargs, cache, str(accelerator.device), **reading)


def main(argv: list[str] | None = None) -> int:
    """Write the scores and print their means; return the exit status."""
    args = parse_score_args(argv)
    try:
        sets = {folder: checked_set(folder, args) for folder in args.folders}
        accelerator = open_processes(args)
        reading = {"max_frames": args.max_frames, "fps": args.fps, "allow_truncated": args.allow_truncated}
        scorer = open_scorer(args, accelerator, args.rewards, args.kwargs, **reading)
        rows, errors, notes = [("folder", "videos", *scorer.specs)], [], []
        for folder, videos in sets.items():
            scored = score_all(videos, scorer, accelerator, args.strict)
            if accelerator.is_main_process:
                write_scores(folder, videos, scored, scorer.conditions)
                errors += [row["error"] for row in scored if "error" in row]
                pairs = zip(videos, scored, strict=True)
                notes += [f"{video.path}: scored {row['missing']}" for video, row in pairs if row.get("missing")]
                rows.append(_mean_row(folder, scorer.specs, [row["scores"] for row in scored if "scores" in row]))
    except (ValueError, OSError) as error:  # RewardError is a ValueError
        print(f"eval/score.py: {error}", file=sys.stderr)
        return 2
    if accelerator.is_main_process:
        print(f"mean scores\n{format_table(rows)}")
        for note in notes:
            print(f"eval/score.py: {note}", file=sys.stderr)
        print_failures("eval/score.py", errors, sum(map(len, sets.values())))
    accelerator.end_training()
    return 1 if errors else 0


def _mean_row(folder: Path, names: Iterable[str], scores: list[dict[str, float]]) -> tuple[str, ...]:
    means = (f"{sum(row[name] for row in scores) / len(scores):.5g}" if scores else "-" for name in names)
    return (str(folder), str(len(scores)), *means)


if __name__ == "__main__":
    sys.exit(main())
