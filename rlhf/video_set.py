"""Videos on disk and what each was asked to show: what `eval/` makes, scores and compares.

A set is a folder. Its prompts are in videos.jsonl, one object a line: {"file", "prompt"} and, where known, "seed" and
"category"; or in the prompts.txt of a run's samples; or in the file names, as VBench has them: `PROMPT-0.mp4`.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rewards.cli.files import VIDEOS
from rlhf.reading import reading

MANIFEST, SCORES = "videos.jsonl", "scores.jsonl"
NUMBER_ENDING = re.compile(r"-\d+$")
Key = tuple[str, int, int]  # prompt, seed, and which of the videos that have both


@dataclass(frozen=True)
class Video:
    """A video that is there, or is to be made."""

    path: Path
    prompt: str
    seed: int = 0
    category: str | None = None


def read_set(folder: Path, names_are_prompts: bool = False) -> list[Video]:
    """The videos of a folder, in the order of its list or of their names.

    names_are_prompts: read them off the file names where there is no list. Raises ValueError for a folder that is
    absent, empty or without prompts, and for a list that does not hold together.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: got no folder there, expected one with videos; correct the path")
    if (folder / MANIFEST).is_file():
        videos = [_listed(folder, number, line) for number, line in _lines(folder / MANIFEST)]
    elif (folder / "prompts.txt").is_file():
        rows = [line.split("\t", 1) for _, line in _lines(folder / "prompts.txt")]
        with reading(folder / "prompts.txt"):
            videos = [Video(folder / f"{name}.mp4", prompt) for name, prompt in rows]
    elif names_are_prompts:
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS)
        videos = [Video(path, prompt_of(path), _number(path)) for path in paths]
    else:
        raise ValueError(
            f"{folder}: got neither {MANIFEST} nor prompts.txt, expected one of them to say what each video was asked "
            'to show; write one ({"file": "a.mp4", "prompt": ".."} a line), or say that the file names are the prompts'
        )
    if not videos:
        raise ValueError(f"{folder}: got no videos, expected one or more ({', '.join(VIDEOS)}); correct the path")
    return videos


def numbered(prompts_and_seeds: Iterable[tuple[str, int]]) -> list[Key]:
    """What pairs each video with another model's: where prompt and seed repeat, the first is the other's first."""
    seen: Counter[tuple[str, int]] = Counter()
    keys = []
    for prompt, seed in prompts_and_seeds:
        keys.append((prompt, seed, seen[prompt, seed]))
        seen[prompt, seed] += 1
    return keys


def unbroken(prompt: str) -> str:
    """The prompt as prompts.txt has it."""
    return " ".join(prompt.splitlines())


def require_files(videos: list[Video]) -> None:
    """Raise ValueError if some are not there."""
    absent = [video.path for video in videos if not video.path.is_file()]
    if absent:
        raise ValueError(
            f"{absent[0]}: got {len(absent)} of {len(videos)} videos missing, expected all of them; finish making them"
        )


def together(folder: Path, videos: list[Video]) -> list[Video]:
    """The videos that the folder lists, and these. Raises ValueError if the list says otherwise of one of them."""
    path = folder / MANIFEST
    old = {video.path: video for video in read_set(folder)} if path.is_file() else {}
    for video in videos:
        if video.path in old and old[video.path].prompt != video.prompt:
            raise ValueError(
                f"{path}: got the prompt {old[video.path].prompt!r} for {video.path.name}, expected {video.prompt!r}: "
                "the prompts have changed since; choose another output folder"
            )
    return list((old | {video.path: video for video in videos}).values())


def write_manifest(folder: Path, videos: list[Video]) -> None:
    """Write videos.jsonl."""
    write_rows(folder / MANIFEST, [_row(folder, video) for video in videos])


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write an object a line, whole or not at all."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    unfinished.replace(path)


def name_in(folder: Path, path: Path) -> str:
    """The path as a list in the folder has it: relative to the folder, for a file elsewhere as it was given."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def prompt_of(path: Path) -> str:
    """The prompt in a file name: all but the ending and a number before it, as VBench's own tool reads it."""
    return NUMBER_ENDING.sub("", path.stem)


def _number(path: Path) -> int:
    ending = NUMBER_ENDING.search(path.stem)
    return int(ending[0][1:]) if ending else 0


def _row(folder: Path, video: Video) -> dict:
    row = dataclasses.asdict(video)
    row = {"file": name_in(folder, row.pop("path"))} | row
    return {key: value for key, value in row.items() if value is not None}


def _lines(path: Path) -> list[tuple[int, str]]:
    with reading(path):
        lines = path.read_text(encoding="utf-8").splitlines()
    return [(i, line) for i, line in enumerate(lines, 1) if line.strip()]


def _listed(folder: Path, number: int, line: str) -> Video:
    try:
        row = json.loads(line)
        return Video(folder / row["file"], str(row["prompt"]), int(row.get("seed", 0)), row.get("category"))
    except (ValueError, KeyError, TypeError) as error:
        expected = 'an object with "file" and "prompt"'
        raise ValueError(
            f"{folder / MANIFEST}, line {number}: got {line!r}, expected {expected}; correct it"
        ) from error
