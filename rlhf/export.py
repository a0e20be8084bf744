"""What a training run learned, for use elsewhere: `python -m rlhf.export RUN --merged OUT` or `--adapter OUT`.

--merged       a complete pipeline with the adapter added to the weights: loads here and in ContentV's published code
--adapter      the LoRA weights alone, which `pipe.load_lora_weights(OUT)` reads
--convention   of these: diffusers, or comfyui, whose readers find the scale in the weights
--scale s      either with the adapter counted s times
--push_to_hub  upload it, too

Either comes with a model card, OUT/README.md.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from rlhf.adapter.merge import ADAPTER_FILE, load_adapter, merged
from rlhf.config import is_distilled
from rlhf.contentv.files import CONFIG_FILES, SamplingDefaults, model_folder, one_line
from rlhf.contentv.loading import load_transformer
from rlhf.contentv.pipeline import INDEX_CLASSES
from rlhf.hub import check_push, push
from rlhf.lora_scale import check_scale, fold_scale
from rlhf.model_card import Export, write_card
from rlhf.reading import reading
from rlhf.run_folder import settings_in


def export_merged(run: Path, out: Path, scale: float = 1.0, model: str | None = None) -> None:
    """Write a pipeline in diffusers layout to `out`: the base model of the run, its transformer with the adapter in it.

    Everything but the transformer is copied file by file. The transformer is written in the dtype it is loaded in:
    bfloat16 for ContentV-8B, which rounds the sum of weight and adapter once.

    Args:
        model: the base model's new name or place, if config.yaml names one that is no longer there.

    Raises:
        ValueError: no finished run in `run`, `out` in use, base model absent, adapter that is not finite.
    """
    adapter = _check(run, out, scale)
    config = settings_in(run)
    base = model_folder(model or config["model"])
    transformer = load_transformer(base)
    load_adapter(transformer, adapter.parent)
    with _nothing_left_by_an_error(out):
        with merged(transformer, scale) as plain:
            plain.save_pretrained(out / "transformer")
        for name in set(CONFIG_FILES) - {"transformer"}:
            shutil.copytree(base / name, out / name)
        alone = {"guidance_scale": 1.0} if is_distilled(config) else {}
        replace(SamplingDefaults.load(base), **alone).save(out)
        index = json.loads((base / "model_index.json").read_text()) | {"transformer": INDEX_CLASSES["transformer"]}
        (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        write_card(Export(run, "merged", scale, model), out)


def export_adapter(
    run: Path, out: Path, scale: float = 1.0, convention: str = "diffusers", model: str | None = None
) -> None:
    """Write the adapter of a run to `out`/pytorch_lora_weights.safetensors, its B matrices multiplied by `scale`.

    convention: "diffusers", or "comfyui": with lora_alpha / r in the B matrices as well, see `rlhf.lora_scale`.
    Raises ValueError as `export_merged` does, and for DoRA with "comfyui" or another scale than 1.
    """
    adapter = _check(run, out, scale)
    with reading(adapter), safe_open(adapter, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{adapter}: got NaN or infinity in {broken[0]}, expected finite weights; train again")
    if scale != 1 and any("magnitude" in key for key in tensors):
        raise ValueError(f"scale: got {scale} for magnitudes (lora_use_dora), which need the base; use --merged")
    tensors = {key: value * scale if "lora_B" in key else value for key, value in tensors.items()}
    if convention == "comfyui":
        tensors, metadata = fold_scale(tensors, metadata)
    with _nothing_left_by_an_error(out):
        save_file(tensors, out / ADAPTER_FILE, metadata)
        write_card(Export(run, convention, scale, model), out)


@contextmanager
def _nothing_left_by_an_error(out: Path) -> Iterator[None]:
    """Make the folder, new or empty; where the work inside breaks off, it is so again, free for the next try."""
    was_there = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not was_there:
            out.rmdir()
        raise


def _check(run: Path, out: Path, scale: float) -> Path:
    """The adapter file of a run, after making sure that there is one, that `out` is free and scale a number."""
    check_scale(scale)
    adapter = run / "adapter" / ADAPTER_FILE
    for file in (run / "config.yaml", adapter):
        if not file.is_file():
            raise ValueError(f"{file} is not there, expected the folder of a finished training run; correct {run}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty, expected a new folder; choose another or remove it")
    return adapter


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The flags of the command."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.export", description="Export what a training run learned.")
    parser.add_argument("run", type=Path, help="folder of a training run")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--merged", type=Path, metavar="OUT", help="write a complete pipeline, adapter merged")
    target.add_argument("--adapter", type=Path, metavar="OUT", help="write the adapter alone")
    choices, default = ("diffusers", "comfyui"), " (default: %(default)s)"
    parser.add_argument("--convention", choices=choices, default=choices[0], help=f"of the adapter's file{default}")
    parser.add_argument("--scale", type=float, default=1.0, help=f"count the adapter this often{default}")
    parser.add_argument("--model", help="base model, if not the one in the run's config.yaml")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload it to this repository, made if it is not there")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    args = parser.parse_args(arguments)
    if args.merged and args.convention != choices[0]:
        parser.error(f"--convention: got {args.convention} with --merged, expected it with --adapter; leave it out")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command. Exits with a message where something is wrong."""
    args = parse(arguments)
    out = args.merged or args.adapter
    try:
        if args.push_to_hub:
            check_push(args.push_to_hub)
        if args.merged:
            export_merged(args.run, out, args.scale, args.model)
        else:
            export_adapter(args.run, out, args.scale, args.convention, args.model)
        print(f"wrote {out}")
        if args.push_to_hub:
            print(f"uploaded to {push(out, args.push_to_hub, args.private)}")
    except ValueError as error:
        raise SystemExit(f"rlhf.export: error: {error}") from error
    except OSError as error:  # what a look at the folders does not tell
        expected = f"expected to read {args.run} and to write {out}; look at the paths, the rights and the disk"
        raise SystemExit(f"rlhf.export: error: got {one_line(error)}, {expected}") from error


if __name__ == "__main__":
    main()
