"""Make videos in VBench's folder layout, and compute those of its dimensions that are rewards here.

    python eval/vbench.py make --full_info VBench_full_info.json --from_run runs/a --output vbench/a
    python eval/vbench.py score --full_info VBench_full_info.json --output vbench/a --device cuda

VBench_full_info.json comes with VBench (github.com/Vchitect/VBench, folder vbench): its 946 prompts
with the dimensions, 16 in all, that each is for. `make` writes OUTPUT/SUITE/PROMPT-INDEX.mp4, five
videos a prompt and 25 for temporal_flickering, each from its own noise. It prints the official
tool's command for every dimension. A second start resumes. With `accelerate launch` all devices
share the work.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from generate import add_model_flags, checked_sampling, fill_from_run, make_videos
from score import add_scoring_flags, open_processes, open_scorer, score_all

from rewards.cli.flags import file_to_write
from rewards.cli.table import format_table
from rlhf.evaluation.video_set import Video, require_files
from rlhf.io import write_json

# VBench's dimensions -> the suite of prompts, and folder, of each (its dimension_to_folder.json).
SUITES = {
    "subject_consistency": "subject_consistency",
    "background_consistency": "scene",
    "temporal_flickering": "temporal_flickering",
    "motion_smoothness": "subject_consistency",
    "dynamic_degree": "subject_consistency",
    "aesthetic_quality": "overall_consistency",
    "imaging_quality": "overall_consistency",
    "object_class": "object_class",
    "multiple_objects": "multiple_objects",
    "human_action": "human_action",
    "color": "color",
    "spatial_relationship": "spatial_relationship",
    "scene": "scene",
    "temporal_style": "temporal_style",
    "appearance_style": "appearance_style",
    "overall_consistency": "overall_consistency",
}
VIDEOS_PER_PROMPT, FLICKERING_VIDEOS = 5, 25  # VBench's prompts/README.md; the 25 are filtered for still ones
MP4 = {"preprocessing": "vbench_mp4"}
# Dimension -> the reward that computes it, its arguments, and how it differs from VBench.
REWARDS = {
    "subject_consistency": ("subject_consistency", MP4, "the same formula, resized as VBench resizes mp4 files"),
    "background_consistency": ("background_consistency", MP4, "the same formula, resized as VBench resizes mp4 files"),
    "temporal_flickering": ("flicker", {}, "the same formula, of all videos: VBench leaves out those that move"),
    "dynamic_degree": ("motion_degree", {}, "share of moving pairs of frames, softly; VBench: share of moving videos"),
}
MAX_NAME_BYTES = 255  # on the usual file systems


def parse_vbench_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/vbench.py", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="make the videos")
    scoring = commands.add_parser("score", help="compute the dimensions that are rewards here")
    for command in (making, scoring):
        command.add_argument("--full_info", type=Path, required=True, help="path of VBench_full_info.json")
        command.add_argument("--output", type=Path, required=True, help="folder of the videos")
        names = {"nargs": "+", "choices": SUITES, "metavar": "NAME"}
        command.add_argument("--dimension", help="dimensions (default: all)", **names)
    add_model_flags(making)
    making.add_argument("--seed", type=int, default=0, help="seed of all noise (default: 0)")
    add_scoring_flags(scoring)
    scoring.add_argument("--json", type=file_to_write, help="also write the values to this file")
    return parser.parse_args(argv)


def read_suites(path: Path, dimensions: list[str] | None) -> dict[str, list[str]]:
    """Return {suite: prompts} of the dimensions (None: all). Raise ValueError for another file."""
    try:
        rows = [(row["prompt_en"], row["dimension"]) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: got {type(error).__name__}, expected VBench_full_info.json, a list of objects with "
            "'prompt_en' and 'dimension'; take it from VBench's folder vbench"
        ) from error
    suites: dict[str, list[str]] = {}
    for dimension in dimensions or SUITES:
        prompts = list(dict.fromkeys(prompt for prompt, of in rows if dimension in of))
        if not prompts:
            got = f"no prompt for {dimension}"
            raise ValueError(f"{path}: got {got}, expected some; take the file of VBench's text-to-video")
        suites[SUITES[dimension]] = prompts
    return suites


def vbench_videos(root: Path, suites: dict[str, list[str]], seed: int = 0) -> list[Video]:
    """Return the videos that VBench expects: ROOT/SUITE/PROMPT-INDEX.mp4.

    The index is part of the seed: two videos of a prompt have different noise, the same for every
    model. Raises ValueError for a prompt that cannot be a file name.
    """
    videos = []
    for suite, prompts in suites.items():
        count = FLICKERING_VIDEOS if suite == "temporal_flickering" else VIDEOS_PER_PROMPT
        for prompt in prompts:
            names = [f"{prompt}-{i}.mp4" for i in range(count)]
            if "/" in prompt or len(os.fsencode(names[-1])) > MAX_NAME_BYTES:
                raise ValueError(
                    f"prompt {prompt!r}: got one that can't be a file name, expected no '/' and at "
                    f"most {MAX_NAME_BYTES} bytes with its ending, as in VBench's prompts; correct the file"
                )
            videos += [Video(root / suite / name, prompt, seed * 1000 + i) for i, name in enumerate(names)]
    return videos


def official_commands(root: Path, dimensions: list[str] | None) -> str:
    """Return the official tool's commands for the videos."""
    lines = []
    for dimension in dimensions or SUITES:
        folder = root.resolve() / SUITES[dimension]
        if dimension == "temporal_flickering":  # the filter copies what it keeps to filtered_videos
            lines.append(f"vbench static_filter --videos_path {folder} --result_path {folder}_static")
            folder = f"{folder}_static/filtered_videos"
        lines.append(f"vbench evaluate --videos_path {folder} --dimension {dimension}")
    return "\n".join(lines)


def score_dimensions(args: argparse.Namespace) -> tuple[list[dict], bool]:
    """Return rows {"dimension", "value", "videos", "note"}, and whether this process is main."""
    dimensions = [name for name in args.dimension or REWARDS if name in REWARDS]
    if not dimensions:
        expected = f"expected some of {', '.join(REWARDS)}"
        raise ValueError(f"--dimension: got none that is a reward here, {expected}; add one")
    sets = {name: vbench_videos(args.output, read_suites(args.full_info, [name])) for name in dimensions}
    for videos in sets.values():
        require_files(videos)
    rows, accelerator = [], open_processes(args)
    for name, videos in sets.items():
        reward, kwargs, note = REWARDS[name]
        scorer = open_scorer(args, accelerator, [reward], {reward: kwargs})
        values = [row["scores"][reward] for row in score_all(videos, scorer, accelerator)]
        mean = sum(values) / len(values) if values else None  # other processes have none
        rows.append({"dimension": name, "value": mean, "videos": len(videos), "note": note})
    accelerator.end_training()
    return rows, accelerator.is_main_process


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = parse_vbench_args(argv)
    try:
        if args.command == "make":
            fill_from_run(args)
            videos = vbench_videos(args.output, read_suites(args.full_info, args.dimension), args.seed)
            # No manifest: the official tool takes the first file of a folder for a video.
            make_videos(args, checked_sampling(args, "nano_held_out"), videos, manifest=False)
            print(f"With `pip install vbench`:\n{official_commands(args.output, args.dimension)}")
            return 0
        rows, is_main = score_dimensions(args)
    except (ValueError, OSError) as error:
        print(f"eval/vbench.py: {error}", file=sys.stderr)
        return 2
    if is_main:
        cells = [(row["dimension"], f"{row['value']:.4f}", str(row["videos"]), row["note"]) for row in rows]
        print(format_table([("dimension", "value", "videos", "against VBench"), *cells]))
        if args.json:
            write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
