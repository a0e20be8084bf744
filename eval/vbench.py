"""Videos laid out as VBench's own tool reads them, and our values for those of its dimensions that our rewards are:

    accelerate launch eval/vbench.py make --full_info VBench_full_info.json --from_run runs/mine --output vbench/mine
    python eval/vbench.py score --full_info VBench_full_info.json --output vbench/mine --device cuda

VBench_full_info.json comes with VBench (github.com/Vchitect/VBench, folder vbench): its 946 prompts and which of the 16
dimensions each is for. `make` writes OUTPUT/SUITE/PROMPT-INDEX.mp4, five of a prompt and 25 for temporal_flickering,
each from noise of its own, and prints the official tool's command for every dimension. Started again it goes on.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from generate import add_model_flags, checked_sampling, fill_from_run, make
from score import add_scoring_flags, open_processes, open_scorer, score_all

from rewards.cli.flags import file_to_write
from rewards.cli.table import format_table
from rlhf.video_set import Video, require_files

# VBench's dimensions -> the suite of prompts, and so the folder, that each is judged on (its dimension_to_folder.json).
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
VIDEOS_OF_A_PROMPT, OF_TEMPORAL_FLICKERING = 5, 25  # its prompts/README.md; the latter are filtered for still ones
# Dimension -> the reward that it is, and where ours differs.
OURS = {
    "subject_consistency": ("subject_consistency", "the same formula; frames are resized with antialiasing"),
    "background_consistency": ("background_consistency", "the same formula; frames are resized with antialiasing"),
    "temporal_flickering": ("flicker", "the same formula, of all videos: VBench leaves out those that move"),
    "dynamic_degree": ("motion_degree", "share of moving pairs of frames, softly; VBench: share of moving videos"),
}
LONGEST_NAME = 255  # bytes, on the usual file systems


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="eval/vbench.py", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="make the videos")
    scoring = commands.add_parser("score", help="our values for the dimensions that our rewards are")
    for command in (making, scoring):
        command.add_argument("--full_info", type=Path, required=True, help="path of VBench_full_info.json")
        command.add_argument("--output", type=Path, required=True, help="folder of the videos")
        command.add_argument(
            "--dimension", nargs="+", default=None, choices=SUITES, metavar="NAME", help="default: all"
        )
    add_model_flags(making)
    making.add_argument("--seed", type=int, default=0, help="of all noise (default: 0)")
    add_scoring_flags(scoring)
    scoring.add_argument("--json", type=file_to_write, help="write the values to this file, too")
    return parser.parse_args(argv)


def read_suites(path: Path, dimensions: list[str] | None) -> dict[str, list[str]]:
    """{suite: prompts} that the dimensions (None: all) are judged on. Raises ValueError for a file of another form."""
    try:
        rows = [(row["prompt_en"], row["dimension"]) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: got {type(error).__name__}, expected VBench_full_info.json, a list of objects with 'prompt_en' "
            "and 'dimension'; take it from VBench's folder vbench"
        ) from error
    suites: dict[str, list[str]] = {}
    for dimension in dimensions or SUITES:
        prompts = [prompt for prompt, of in rows if dimension in of]
        if not prompts:
            raise ValueError(
                f"{path}: got no prompt for {dimension}, expected some; take the file of VBench's text-to-video"
            )
        suites[SUITES[dimension]] = prompts
    return suites


def layout(root: Path, suites: dict[str, list[str]], seed: int = 0) -> list[Video]:
    """The videos that VBench expects: ROOT/SUITE/PROMPT-INDEX.mp4. Raises ValueError for a prompt that names no file.

    The index is part of the seed: the noise of two videos of a prompt differs, and is the same for every model.
    """
    videos = []
    for suite, prompts in suites.items():
        count = OF_TEMPORAL_FLICKERING if suite == "temporal_flickering" else VIDEOS_OF_A_PROMPT
        for prompt in prompts:
            names = [f"{prompt}-{i}.mp4" for i in range(count)]
            if "/" in prompt or len(os.fsencode(names[-1])) > LONGEST_NAME:
                raise ValueError(
                    f"prompt {prompt!r}: got one that can't be a file name, expected no '/' and at most "
                    f"{LONGEST_NAME} bytes with its ending, as in VBench's own prompts; correct the file"
                )
            videos += [Video(root / suite / name, prompt, seed * 1000 + i) for i, name in enumerate(names)]
    return videos


def commands(root: Path, dimensions: list[str] | None) -> str:
    """The official tool's commands for the videos."""
    lines = []
    for dimension in dimensions or SUITES:
        folder = root.resolve() / SUITES[dimension]
        if dimension == "temporal_flickering":  # what the filter keeps is named anew, under filtered_videos
            lines.append(f"vbench static_filter --videos_path {folder} --result_path {folder}_static")
            folder = f"{folder}_static/filtered_videos"
        lines.append(f"vbench evaluate --videos_path {folder} --dimension {dimension}")
    return "\n".join(lines)


def our_values(args: argparse.Namespace) -> tuple[list[dict], bool]:
    """{"dimension", "value", "videos", "note"} for each dimension that a reward of ours is; whether to print them."""
    dimensions = [name for name in args.dimension or OURS if name in OURS]
    if not dimensions:
        raise ValueError(f"--dimension: got none that is a reward of ours, expected some of {', '.join(OURS)}; add one")
    sets = {name: layout(args.output, read_suites(args.full_info, [name])) for name in dimensions}
    for videos in sets.values():
        require_files(videos)
    rows, accelerator = [], open_processes(args)
    for name, videos in sets.items():
        reward, note = OURS[name]
        scorer = open_scorer(args, accelerator, [reward], {})
        values = [scores[reward] for scores in score_all(videos, scorer, accelerator)]
        mean = sum(values) / len(values) if values else None  # the main process has them
        rows.append({"dimension": name, "value": mean, "videos": len(videos), "note": note})
    accelerator.end_training()
    return rows, accelerator.is_main_process


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    args = parse(argv)
    try:
        if args.command == "make":
            fill_from_run(args)
            videos = layout(args.output, read_suites(args.full_info, args.dimension), args.seed)
            # No list beside the videos: the official tool takes the first file of a folder for a video.
            make(args, checked_sampling(args, "nano_held_out"), videos, listed=False)
            print(f"With `pip install vbench`:\n{commands(args.output, args.dimension)}")
            return 0
        rows, shown = our_values(args)
    except (ValueError, OSError) as error:
        print(f"eval/vbench.py: {error}", file=sys.stderr)
        return 2
    if shown:
        cells = [(row["dimension"], f"{row['value']:.4f}", str(row["videos"]), row["note"]) for row in rows]
        print(format_table([("dimension", "value", "videos", "against VBench"), *cells]))
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
