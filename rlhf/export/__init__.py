"""Export what a run has trained: `python -m rlhf.export RUN --merged OUT` or `--adapter OUT`.

RUN            a run, finished or interrupted, or one of its checkpoints, RUN/checkpoints/step-N
--merged       a complete pipeline, the adapter added to the weights; the authors' code loads it
--adapter      the LoRA weights alone, for `pipe.load_lora_weights(OUT)`
--convention   keys of the adapter file: diffusers, or comfyui with the scale in the weights
--scale s      multiply the adapter by s
--push_to_hub  upload the export, too

Both come with a model card, OUT/README.md. An adapter that the run started from is part of both.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rlhf.adapter.lora_file import MERGED_KEY, read_lora, read_lora_for
from rlhf.adapter.lora_weights import ADAPTER_FILE, Lora
from rlhf.adapter.merge import apply_lora, check_lora_scale
from rlhf.export.hub import check_push, push
from rlhf.export.model_card import Export, write_card
from rlhf.export.trained import Trained, find_trained
from rlhf.generator.files import family_of_folder, model_folder, model_sizes, one_line
from rlhf.generator.loading import linear_sizes, load_transformer
from rlhf.generator.registry import ModelFamily, SamplingDefaults, family_of_config, family_of_layers
from rlhf.io import read_object, write_json
from rlhf.run.folder import read_settings

PATH_KEYS = ("_name_or_path", "name_or_path")  # of config files: where their maker had them


def export_merged(run: Path, out: Path, scale: float = 1.0, model: str | None = None) -> None:
    """Write a pipeline in diffusers layout: the run's base model, the adapter in its weights.

    All parts but the transformer are copied file by file, without paths of this machine. The
    transformer is written in the dtype of loading. bfloat16 rounds the sum of weight and adapter
    once.

    run: folder of a training run, or of one of its checkpoints. out: new or empty folder. scale:
    factor of the adapter. model: name or path of the base model, if it is no longer where
    config.yaml says. Raises ValueError without an adapter, for `out` in use, an absent base model
    and an adapter that does not fit or is not finite.
    """
    trained = _check_export(run, out, scale)
    base = model_folder(model or read_settings(trained.run)["model"])
    family = family_of_folder(base)
    config = model_sizes(base)["transformer"]
    lora = read_lora_for(config, trained.adapter)
    print(f"exporting {trained.origin}")
    transformer = load_transformer(base)
    print(apply_lora(transformer, lora, scale, merge=True))
    with empty_folder_on_error(out):
        transformer.save_pretrained(out / "transformer")
        _record_merged_lora(out / "transformer" / family.config_files["transformer"], config, lora)
        for name in set(family.config_files) - {"transformer"}:
            shutil.copytree(base / name, out / name)
        guidance = {"guidance_scale": 1.0} if lora.distilled else {}
        replace(SamplingDefaults.load(base, family.sampling), **guidance).save(out)
        index = json.loads((base / "model_index.json").read_text())
        write_json(out / "model_index.json", index | {"transformer": ("diffusers", family.transformer_classes[0])})
        _remove_paths(out)
        write_card(Export(trained.run, "merged", scale, model, trained.step, lora.distilled, family), out)


def export_adapter(
    run: Path, out: Path, scale: float = 1.0, convention: str = "diffusers", model: str | None = None
) -> None:
    """Write the run's adapter to `out`/pytorch_lora_weights.safetensors, B multiplied by `scale`.

    Arguments and errors are those of `export_merged`. convention: "diffusers", or "comfyui" with
    lora_alpha / r in B as well: ComfyUI reads the scale from tensors `NAME.alpha`, which diffusers
    refuses, and takes it as 1 without them (its comfy/weight_adapter/lora.py). Raises ValueError
    also for DoRA with "comfyui", which names its tensors differently, or another scale than 1, and
    for an adapter that does not fit the base model. The names of layers stand in for a base model
    that is not here.
    """
    trained = _check_export(run, out, scale)
    lora = read_lora(trained.adapter)
    family, is_comfyui = _find_family(trained, lora, model), convention == "comfyui"
    if lora.has_magnitudes and (scale != 1 or is_comfyui):
        got = f"scale: got {scale}" if scale != 1 else f"convention: got {convention}"
        raise ValueError(f"{got} for an adapter with magnitudes (DoRA), expected plain LoRA; use --merged")
    print(f"exporting {trained.origin}" + f"; {lora.remark}" * bool(lora.remark))
    with empty_folder_on_error(out):
        lora = lora.scaled(scale, fold=is_comfyui)
        if is_comfyui and family.renamed:
            lora.save_original(out / ADAPTER_FILE, family.original_name)
        else:
            lora.save(out / ADAPTER_FILE)
        write_card(Export(trained.run, convention, scale, model, trained.step, lora.distilled, family), out)


def _find_family(trained: Trained, lora: Lora, model: str | None) -> ModelFamily:
    """Return the base model's family, by its files; by the layers' names if it is not here.

    Raises ValueError where neither decides, and for layers of another model.
    """
    name, by_layers = model or read_settings(trained.run).get("model"), family_of_layers(lora.layers)
    first, cure = next(iter(lora.layers)), "name the model that the run trained by --model"
    try:
        config = model_sizes(name)["transformer"]
    except ValueError as error:
        if by_layers:
            return by_layers
        got = f"got no base model ({error}) and no layer by whose name a kind of model is known, such as {first}"
        raise ValueError(f"{trained.adapter}: {got}, expected either; {cure}") from error
    family = family_of_config(config)
    sizes = {} if by_layers else linear_sizes(config)
    fits = all(sizes.get(key) == (len(part.b), part.a.shape[1]) for key, part in lora.layers.items())
    if by_layers != family if by_layers else not fits:
        got = f"got layers of {by_layers.name if by_layers else 'another model'}, such as {first}"
        raise ValueError(f"{trained.adapter}: {got}, expected those of model={name!r}, a {family.name}; {cure}")
    return family


def _record_merged_lora(path: Path, base: dict, lora: Lora) -> None:
    """Add the LoRA's identity to the exported config, so that none is merged twice."""
    write_json(path, read_object(path) | {MERGED_KEY: [*base.get(MERGED_KEY, ()), lora.identity]})


def _remove_paths(folder: Path) -> None:
    """Remove the paths of who made them from the config files of a pipeline."""
    for path in folder.glob("**/*.json"):
        content = read_object(path) if path.name.endswith(("config.json", "model_index.json")) else {}
        if any(key in content for key in PATH_KEYS):
            write_json(path, {key: value for key, value in content.items() if key not in PATH_KEYS})


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


def _check_export(path: Path, out: Path, scale: float) -> Trained:
    """Return what is exported. Raise ValueError if nothing was trained, or `out` is in use."""
    check_lora_scale(scale)
    trained = find_trained(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty, expected a new folder; choose another or remove it")
    return trained


def parse_export_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m rlhf.export", description="Export what a training run has trained."
    )
    parser.add_argument("run", type=Path, help="folder of a training run, or one of its checkpoints")
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
