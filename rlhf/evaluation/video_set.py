"""Sets of videos on disk with their prompts, which `eval/` makes, scores and compares.

A set is a folder. Its prompts are in videos.jsonl, an object a line: {"file", "prompt"} and, where
known, "seed" and "category". Further fields, also those of an object "row", are the prompt's row,
which rewards read. Or they are in the prompts.txt of a run's samples, or in file names of
VBench: `PROMPT-0.mp4`.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rewards.cli.files import VIDEOS, visible_files
from rlhf.io import file_errors, read_lines, write_rows
from rlhf.run.folder import PROMPTS
from rlhf.types import Prompt, fields_of, row_of

MANIFEST, SCORES = "videos.jsonl", "scores.jsonl"
NUMBER_ENDING = re.compile(r"-(\d+)$")
Key = tuple[str, int, int]  # prompt, seed, position among the videos of both


@dataclass(frozen=True)
class Video:
    """A video that exists or is to be made."""

    path: Path
    prompt: str
    seed: int = 0
    category: str | None = None


def read_set(folder: Path, names_are_prompts: bool = False, with_folders: bool = False) -> list[Video]:
    """Return the videos of a folder, in the order of its manifest or of their names.

    names_are_prompts: without a manifest, read the prompts from the file names. with_folders: also
    from the names of subfolders, which hold pictures. Raises ValueError if the folder is absent,
    empty or without prompts, or if the manifest is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: got no folder there, expected one with videos; correct the path")
    if (folder / MANIFEST).is_file():
        videos = [_parse_row(folder, number, line) for number, line in _numbered_lines(folder / MANIFEST)]
    elif (folder / PROMPTS).is_file():
        rows = [line.split("\t", 1) for _, line in _numbered_lines(folder / PROMPTS)]
        with file_errors(folder / PROMPTS):
            videos = [Video(folder / f"{name}.mp4", prompt) for name, prompt in rows]
    elif names_are_prompts:
        paths = visible_files(folder, VIDEOS)
        if with_folders:
            paths = sorted(paths + [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."])
        videos = [Video(path, prompt_from_name(path), _seed_from_name(path)) for path in paths]
    else:
        raise ValueError(
            f"{folder}: got neither {MANIFEST} nor {PROMPTS}, expected one of them with the prompt of "
            'each video; write one ({"file": "a.mp4", "prompt": ".."} a line), or say that the file '
            "names are the prompts"
        )
    if not videos:
        kinds = ", ".join(VIDEOS)
        raise ValueError(f"{folder}: got no videos, expected one or more ({kinds}); correct the path")
    return videos


def pair_keys(prompts_and_seeds: Iterable[tuple[str, int]]) -> list[Key]:
    """Return a key for each video, equal for the videos of two models that are to be paired.

    Videos that repeat prompt and seed are paired in their order.
    """
    seen: Counter[tuple[str, int]] = Counter()
    keys = []
    for prompt, seed in prompts_and_seeds:
        keys.append((prompt, seed, seen[prompt, seed]))
        seen[prompt, seed] += 1
    return keys


def pair_videos(first: list[Video], second: list[Video]) -> dict[Key, tuple[Video, Video]]:
    """Return the pairs of videos of two models by key, in the order of the first.

    Videos that repeat prompt and seed have partners only if the other set repeats them with the
    same rows in the same order: their noise depends on their place.
    """
    keyed, rows = [], []  # of each set; rows by prompt and seed
    for videos in (first, second):
        keyed.append(dict(zip(pair_keys((video.prompt, video.seed) for video in videos), videos, strict=True)))
        rows.append(defaultdict(list))
        for key, video in keyed[-1].items():
            rows[-1][key[:2]].append(row_of(video.prompt))
    left, right = keyed
    repeats = lambda key: [of_set[key[:2]] for of_set in rows]
    are_alike = lambda one, other: one == other or len(one) == len(other) == 1
    return {key: (left[key], right[key]) for key in left if key in right and are_alike(*repeats(key))}


def require_files(videos: list[Video]) -> None:
    """Raise ValueError if the file of a video is absent."""
    absent = [video.path for video in videos if not video.path.exists()]
    if absent:
        got = f"{len(absent)} of {len(videos)} videos missing"
        raise ValueError(f"{absent[0]}: got {got}, expected all of them; finish making them")


def merge_manifest(folder: Path, videos: list[Video]) -> list[Video]:
    """Return the videos in the folder's manifest, if it has one, extended by `videos`.

    Raises ValueError if the manifest has another prompt for one of `videos`.
    """
    path = folder / MANIFEST
    old = {video.path: video for video in read_set(folder)} if path.is_file() else {}
    for video in videos:
        if video.path in old and _generation_inputs(old[video.path].prompt) != _generation_inputs(video.prompt):
            raise ValueError(
                f"{path}: got the prompt {old[video.path].prompt!r} for {video.path.name}, expected "
                f"{video.prompt!r}: the prompts have changed; choose another output folder"
            )
    return list((old | {video.path: video for video in videos}).values())


def _generation_inputs(prompt: str) -> tuple[str, str | None]:
    """Return the prompt's text and its negative prompt, on which its video depends."""
    return str(prompt), row_of(prompt).get("negative_prompt")


def write_manifest(folder: Path, videos: list[Video]) -> None:
    """Write the manifest videos.jsonl: file, prompt, seed, and category and row where known."""
    rows = []
    for video in videos:
        row = {"file": relative_name(folder, video.path), "prompt": video.prompt, "seed": video.seed}
        row |= {} if video.category is None else {"category": video.category}
        rows.append(row | ({"row": fields} if (fields := fields_of(video.prompt)) else {}))
    write_rows(folder / MANIFEST, rows)


def relative_name(folder: Path, path: Path) -> str:
    """Return the path relative to the folder, or unchanged if it is outside of the folder."""
    return (path.relative_to(folder) if path.is_relative_to(folder) else path).as_posix()


def prompt_from_name(path: Path) -> str:
    """Return the PROMPT of a file name of VBench, "PROMPT-NUMBER.mp4" or "PROMPT.mp4"."""
    return NUMBER_ENDING.sub("", path.stem)


def _seed_from_name(path: Path) -> int:
    """Return the NUMBER of a file name "PROMPT-NUMBER.mp4", 0 if it has none."""
    ending = NUMBER_ENDING.search(path.stem)
    return int(ending[1]) if ending else 0


def _numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Return the lines that are not blank, with their numbers from 1."""
    with file_errors(path):
        return [(i, line) for i, line in enumerate(read_lines(path), 1) if line.strip()]


def _parse_row(folder: Path, number: int, line: str) -> Video:
    """Parse line `number` of a manifest; raise ValueError for a malformed row."""
    try:
        row = json.loads(line)
        path, seed = folder / row["file"], row.get("seed", 0)
        if not isinstance(row["prompt"], str) or not isinstance(seed, int):
            raise TypeError(row)
        fields = {name: value for name, value in row.items() if name not in ("file", "seed", "row")}
        fields |= row.get("row", {})
        return Video(path, Prompt(row["prompt"], fields), seed, fields.get("category"))
    except (ValueError, KeyError, TypeError) as error:
        expected = 'an object with texts "file" and "prompt", and with a whole "seed" or none'
        raise ValueError(
            f"{folder / MANIFEST}, line {number}: got {line!r}, expected {expected}; correct it"
        ) from error
