"""Export what a run has trained: `python -m rlhf.export RUN --merged OUT` or `--adapter OUT`.

--merged       a complete pipeline, the adapter added to the weights; ContentV's code loads it, too
--adapter      the LoRA weights alone, for `pipe.load_lora_weights(OUT)`
--convention   keys of the adapter file: diffusers, or comfyui with the scale in the weights
--scale s      multiply the adapter by s
--push_to_hub  upload the export, too

Both come with a model card, OUT/README.md.
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

from rlhf.adapter.merge import ADAPTER_FILE, load_adapter, merged, refuse_trained_blocks
from rlhf.adapter.scale import check_scale, fold_scale
from rlhf.config import is_distilled
from rlhf.contentv.files import CONFIG_FILES, SamplingDefaults, model_folder, one_line
from rlhf.contentv.loading import load_transformer
from rlhf.contentv.pipeline import INDEX_CLASSES
from rlhf.export.hub import check_push, push
from rlhf.export.model_card import Export, write_card
from rlhf.io import file_errors, write_json
from rlhf.run.folder import read_settings


def export_merged(run: Path, out: Path, scale: float = 1.0, model: str | None = None) -> None:
    """Write a pipeline in diffusers layout: the run's base model, the adapter in its weights.

    All parts but the transformer are copied file by file. The transformer is written in the dtype
    of loading: bfloat16 for ContentV-8B, which rounds the sum of weight and adapter once.

    run: folder of a finished training run. out: new or empty folder. scale: factor of the adapter.
    model: name or path of the base model, if it is no longer where config.yaml says. Raises
    ValueError without a finished run, for `out` in use, an absent base model and an adapter that is
    not finite.
    """
    adapter = _check_export(run, out, scale)
    config = read_settings(run)
    base = model_folder(model or config["model"])
    transformer = load_transformer(base)
    load_adapter(transformer, adapter.parent)
    with empty_folder_on_error(out):
        with merged(transformer, scale) as plain:
            plain.save_pretrained(out / "transformer")
        for name in set(CONFIG_FILES) - {"transformer"}:
            shutil.copytree(base / name, out / name)
        guidance = {"guidance_scale": 1.0} if is_distilled(config) else {}
        replace(SamplingDefaults.load(base), **guidance).save(out)
        index = json.loads((base / "model_index.json").read_text())
        write_json(out / "model_index.json", index | {"transformer": INDEX_CLASSES["transformer"]})
        write_card(Export(run, "merged", scale, model), out)


def export_adapter(
    run: Path, out: Path, scale: float = 1.0, convention: str = "diffusers", model: str | None = None
) -> None:
    """Write the run's adapter to `out`/pytorch_lora_weights.safetensors, B multiplied by `scale`.

    Arguments and errors are those of `export_merged`. convention: "diffusers", or "comfyui" with
    lora_alpha / r in B as well (`rlhf.adapter.scale`). Raises ValueError also for DoRA with
    "comfyui" or another scale than 1.
    """
    adapter = _check_export(run, out, scale)
    with file_errors(adapter), safe_open(adapter, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    if broken := [key for key, value in tensors.items() if not value.isfinite().all()]:
        got = f"NaN or infinity in {broken[0]}"
        raise ValueError(f"{adapter}: got {got}, expected finite weights; train again")
    if scale != 1 and any("magnitude" in key for key in tensors):
        got = f"{scale} for an adapter with lora_use_dora"
        raise ValueError(f"scale: got {got}, expected 1, as magnitudes need the base; use --merged")
    tensors = {key: value * scale if "lora_B" in key else value for key, value in tensors.items()}
    if convention == "comfyui":
        tensors, metadata = fold_scale(tensors, metadata)
    with empty_folder_on_error(out):
        save_file(tensors, out / ADAPTER_FILE, metadata)
        write_card(Export(run, convention, scale, model), out)


@contextmanager
def empty_folder_on_error(out: Path) -> Iterator[None]:
    """Make the folder or use an empty one; delete what the block wrote if it fails."""
    existed = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not existed:
            out.rmdir()
        raise


def _check_export(run: Path, out: Path, scale: float) -> Path:
    """Return the run's adapter file. Raise ValueError if the run is incomplete or `out` in use."""
    check_scale(scale)
    adapter = run / "adapter" / ADAPTER_FILE
    for file in (run / "config.yaml", adapter):
        if not file.is_file():
            expected = "expected the folder of a finished training run"
            raise ValueError(f"{file} is not there, {expected}; correct {run}")
    refuse_trained_blocks(adapter.parent)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty, expected a new folder; choose another or remove it")
    return adapter


def parse_export_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.export", description="Export what a training run has trained."
    )
    parser.add_argument("run", type=Path, help="folder of a training run")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--merged", type=Path, metavar="OUT", help="write a complete pipeline, adapter merged")
    target.add_argument("--adapter", type=Path, metavar="OUT", help="write the adapter alone")
    choices = ("diffusers", "comfyui")
    parser.add_argument(
        "--convention", choices=choices, default=choices[0], help="keys of the adapter file (default: %(default)s)"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the adapter (default: %(default)s)")
    parser.add_argument("--model", help="base model (default: that of the run's config.yaml)")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the export to this repository, new or not")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    args = parser.parse_args(arguments)
    if args.merged and args.convention != choices[0]:
        got = f"{args.convention} with --merged"
        parser.error(f"--convention: got {got}, expected it with --adapter; leave it out")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Run the command; exit with a message on an error."""
    args = parse_export_args(arguments)
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
    except OSError as error:  # which no check of the folders foresees
        expected = f"expected to read {args.run} and to write {out}; check paths, permissions and disk"
        raise SystemExit(f"rlhf.export: error: got {one_line(error)}, {expected}") from error
