"""Read LoRA files in the formats of diffusers, peft and kohya.

Every file becomes one `Lora`: A, B and alpha by layer. A file that cannot be read exactly is
refused by the name of its format.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import safe_open

from rlhf.adapter.lora_weights import ADAPTER_FILE, DISTILLED_KEY, Lora, LoraLayer
from rlhf.config import is_distilled
from rlhf.generator.files import HUB_ID, describe_download
from rlhf.generator.loading import linear_sizes
from rlhf.generator.registry import ModelFamily, family_of_layers
from rlhf.io import file_errors, read_object

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHECKPOINT_FILES = ("average.safetensors", "adapter.safetensors")  # what of it a run would save
MERGED_KEY = "_merged_adapters"  # of a merged export's transformer/config.json: their `Lora.identity`
SCALE_KEY = "scale_is_of"  # metadata that is added in reading: where the scale is from
OLDER_BLOCKS_FILE = "trained_blocks.safetensors"  # beside the adapter in runs of older versions
INITIAL_KEY = "initial_adapter"  # metadata of a checkpoint, and the folder of its run with that adapter
PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # before names with _ in place of dots
KOHYA_KEYS = "ss_network_alpha", "ss_network_dim"  # of metadata; 0, None and Dynamic say nothing
PARTS = {"lora_A": "a", "lora_down": "a", "lora_linear_layer.down": "a", "lora_magnitude_vector": "magnitude"}
PARTS |= {"lora_B": "b", "lora_up": "b", "lora_linear_layer.up": "b", "alpha": "alpha"}
KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, PARTS))})(?:\.(?!weight$|bias$)([^.]+))?(?:\.weight)?")
# Formats that are not read, by a part of their keys.
FOREIGN = {
    r"\.lokr_": "LoKr (LyCORIS)",
    r"\.hada_": "LoHa (LyCORIS)",
    r"\bb?oft_": "OFT",
    r"\.diff(_b)?$": "whole differences of weights (LyCORIS)",
    r"\.dora_scale": "DoRA as kohya and LyCORIS write it",
    r"\.lora_mid": "LoCon with a middle factor (LyCORIS)",
    r"\.lora_E\b": "AdaLoRA",
    r"vera_lambda": "VeRA",
    r"\.lora_B\b.*\.bias$": "LoRA with biases (lora_bias)",
    r"\blora_te\d?_|\btext_encoder": "LoRA of a text encoder",
    r"joint_blocks": "LoRA in Stable Diffusion 3's own names (kohya's sd-scripts, ComfyUI)",
    r"double_blocks|single_blocks|single_transformer_blocks": "LoRA of FLUX or HunyuanVideo",
    r"(?<!transformer_)blocks[._]\d+[._](self_attn|cross_attn|ffn|attn1|attn2)": "LoRA of Wan",
    r"(input|output|down|up|mid)_blocks?": "LoRA of a U-Net (Stable Diffusion 1, 2 or XL)",
}
IDENTITY_INITS = ("gaussian", "orthogonal")  # init_lora_weights that leave the base as it is
# Fields of peft's LoraConfig with no say in what a trained layer computes.
WITHOUT_EFFECT = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_core", "eva_config", "runtime_config", "use_dora", "qalora_group_size", "ensure_weight_tying"),
}
CURE = "name a LoRA of this model, as a run, peft or diffusers writes it, or merge it into the model by its own tool"
Sizes = dict[str, tuple[int, int]]  # of a model's linear layers: (out, in) by name


def find_lora_file(name: str | Path) -> Path:
    """Return the file of an adapter: a file, its folder, a run, a checkpoint or a hub id.

    Raises ValueError if there is none, or more than one.
    """
    path = Path(name).expanduser()
    if not path.exists() and HUB_ID.fullmatch(str(name)) and not path.parent.is_dir():
        path = _download(str(name))
    if path.is_file() and path.suffix == ".safetensors":
        return path
    files = sorted(file.name for file in path.glob("*.safetensors"))
    is_checkpoint = (path / "state.json").is_file()
    known = (*CHECKPOINT_FILES, ADAPTER_FILE) if is_checkpoint else (ADAPTER_FILE, PEFT_FILE)
    found = [file for file in known if file in files] or files
    if len(found) == 1 or (is_checkpoint and found is not files):
        return path / found[0]
    if (path / "adapter").is_dir():
        return find_lora_file(path / "adapter")
    got = f"{len(files)} files, {', '.join(files)}" if files else f"no {ADAPTER_FILE}"
    got = "a file of another kind, such as a pickle" if path.is_file() else got if path.is_dir() else "nothing there"
    expected = "expected an adapter: a .safetensors file, its folder such as RUN/adapter, or a hub id"
    raise ValueError(f"{name}: got {got}, {expected}; correct the path")


def read_adapter_bytes(name: str | Path) -> bytes:
    """Return the content of an adapter's file, and of peft's configuration beside it."""
    path = find_lora_file(name)
    beside = path.parent / PEFT_CONFIG
    return path.read_bytes() + (beside.read_bytes() if beside.is_file() else b"")


def _download(hub_id: str) -> Path:
    """Download an adapter from the hub; return its folder. Raises ValueError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.safetensors", PEFT_CONFIG], etag_timeout=5))
    except Exception as error:  # offline, unknown, gated and broken connections each have their type
        got, cure = describe_download(hub_id, error)
        expected = "expected a file, the folder of an adapter such as RUN/adapter, or a hub id"
        raise ValueError(f"{hub_id}: got {got}, {expected}; {cure}") from error


def is_distilled_adapter(name: str | Path) -> bool:
    """Return whether an adapter is sampled without guidance; a run of an older version says so."""
    path = find_lora_file(name)
    with file_errors(path), safe_open(path, "pt") as file:
        metadata = _complete_metadata(path, file.metadata() or {})
    return _is_distilled(path, metadata)


def _is_distilled(path: Path, metadata: dict[str, str]) -> bool:
    """Return whether guidance was distilled, by the file's metadata or its run's config.yaml."""
    config = path.absolute().parents[1] / "config.yaml"
    return DISTILLED_KEY in metadata or (config.is_file() and is_distilled(read_object(config)))


def read_lora(name: str | Path, sizes: Sizes | None = None) -> Lora:
    """Return the LoRA of a file, a folder, a run, a checkpoint or a hub id.

    Args:
        name: as in `find_lora_file`.
        sizes: the model's linear layers; None trusts the file, which has to name layers by dots.

    Raises:
        ValueError: no such file, another format, another model, or a LoRA with something missing,
            contradictory or not finite. The message names the file.
    """
    path = find_lora_file(name)
    refuse_trained_blocks(path.parent)
    with file_errors(path), safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        metadata = _complete_metadata(path, file.metadata() or {})
    config = _read_config(path, metadata)
    try:
        if not tensors:
            raise _error("no tensor", "those of a LoRA")
        is_own = path.name in CHECKPOINT_FILES and (path.parent / "state.json").is_file()
        by_layer, given = _group_by_layer(tensors, sizes, is_own)
        is_kohya = config is None and all(key.startswith(FLAT_PREFIXES) for key in tensors)
        remark = _add_stated_alpha(by_layer, *map(metadata.get, KOHYA_KEYS)) if is_kohya else ""
        stated = config is not None or any("alpha" in parts for parts in by_layer.values())
        if not stated and any(key.startswith("base_model.") for key in tensors):
            expected = f"{PEFT_CONFIG} beside it, which has their scale"
            raise _error("peft's keys alone", expected, "put it there, as save_pretrained writes it")
        layers = {name: _read_layer(name, parts, config, sizes, given[name]) for name, parts in by_layer.items()}
        if {layer.magnitude is None for layer in layers.values()} == {True, False}:
            raise _error("magnitudes (DoRA) of some layers only", "them for all layers or for none")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    remark = metadata.get(SCALE_KEY, remark) if stated else "the file states no alpha, so the scale is 1"
    lora = Lora(layers, _is_distilled(path, metadata), remark)
    return _find_initial(path).then(lora) if INITIAL_KEY in metadata else lora


def read_lora_for(transformer: dict[str, Any], name: str | Path) -> Lora:
    """Return a LoRA for a model, by the config of its transformer.

    Raises ValueError as `read_lora`, and for a merged export that holds the LoRA already.
    """
    lora = read_lora(name, linear_sizes(transformer))
    if lora.identity in transformer.get(MERGED_KEY, ()):
        got = "got a LoRA that is merged into the model's weights already"
        raise ValueError(f"{name}: {got}, expected another; leave it out, or name the model that it was trained for")
    return lora


def _complete_metadata(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    """Return a file's metadata, completed by what a checkpoint of an older version lacks.

    Their scale is that of RUN/adapter, or of the settings, which do not know of a peft_config's
    use_rslora.
    """
    state, folder = path.parent / "state.json", path.absolute().parents[1]
    if LORA_ADAPTER_METADATA_KEY in metadata or path.name not in CHECKPOINT_FILES or not state.is_file():
        return metadata
    with file_errors(state):
        settings = read_object(state)["settings"]
        rank, alpha = settings["lora_rank"], settings["lora_alpha"]
        config = {"r": rank, "lora_alpha": rank if alpha is None else alpha}
        config |= {key: settings.get(f"lora_{key}") for key in ("use_dora", "rank_pattern", "alpha_pattern")}
        told = {SCALE_KEY: "the scale is that of the settings of its run, which is of an older version"}
        told |= {DISTILLED_KEY: "true"} if is_distilled(settings) else {}
    adapter = folder.parent / "adapter" / ADAPTER_FILE
    if folder.name == "checkpoints" and adapter.is_file():
        with file_errors(adapter), safe_open(adapter, "pt") as file:
            told |= {SCALE_KEY: f"the scale is that of {adapter}"} | (file.metadata() or {})
    return metadata | {LORA_ADAPTER_METADATA_KEY: json.dumps(config)} | told


def refuse_trained_blocks(folder: str | Path) -> None:
    """Raise ValueError for a run that trained whole blocks, too: those are not loaded."""
    if (Path(folder) / OLDER_BLOCKS_FILE).exists():
        got = f"{folder}: got {OLDER_BLOCKS_FILE} of an older version, which trained blocks without an adapter, too"
        raise ValueError(f"{got}, expected an adapter alone; use that version, or train again without train_blocks")


def _find_initial(path: Path) -> Lora:
    """Return the adapter that the run of a checkpoint began with."""
    for folder in list(path.absolute().parents)[1:3]:
        if (folder / INITIAL_KEY).is_dir():
            return read_lora(folder / INITIAL_KEY)
    expected = f"expected {INITIAL_KEY}/ in the run's folder, to which it adds"
    raise ValueError(f"{path}: got a checkpoint without its run, {expected}; name the checkpoint within its run")


def _add_stated_alpha(by_layer: dict[str, dict[str, torch.Tensor]], alpha: str | None, rank: str | None) -> str:
    """Fill in missing alphas from kohya's metadata, in place; return a remark on contradictions.

    Only for files with kohya's own names: musubi-tuner's converter to other names multiplies the
    scale into the weights and keeps the metadata.
    """
    alpha, rank = (_finite_number(value) for value in (alpha, rank))
    alphas, ranks = set(), set()  # of tensors, other than those of the metadata
    for name, parts in by_layer.items():
        found = float(len(parts["a"])) if "a" in parts else rank
        ranks |= {found} - {rank} if rank else set()
        if alpha and "alpha" not in parts:
            if rank and found != rank:
                got = f"rank {found:g} for {name}, and an alpha only in the metadata, for ss_network_dim {rank:g}"
                raise _error(got, "an alpha of this rank", "the file was changed after training; take the original")
            parts["alpha"] = torch.tensor(alpha)
        given = parts["alpha"].flatten().tolist() if alpha else ()
        alphas |= {value for value in given if not math.isclose(value, alpha, rel_tol=0.01)}  # it may be bfloat16
    differ = []
    for key, stated, others in zip(KOHYA_KEYS, (alpha, rank), (alphas, ranks), strict=True):
        found = ", ".join(f"{value:g}" for value in sorted(others))
        differ += [f"the metadata has {key} {stated:g}, the tensors {found}, which count"] if others else []
    return "; ".join(differ)


def _finite_number(text: str | None) -> float:
    """Return the number in a text; 0 for None, other text and numbers that are not finite."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def _error(got: str, expected: str, cure: str = CURE) -> ValueError:
    """Return a ValueError of got, expected and cure."""
    return ValueError(f"got {got}, expected {expected}; {cure}")


def _read_config(path: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    """Return the LoraConfig in the file's metadata or beside the file; None if there is none.

    Raises ValueError if it describes more than a plain LoRA or DoRA.
    """
    beside = path.parent / PEFT_CONFIG
    if LORA_ADAPTER_METADATA_KEY in metadata:
        with file_errors(path):
            config = json.loads(metadata[LORA_ADAPTER_METADATA_KEY]).items()
            config = {key.removeprefix("transformer."): value for key, value in config}
    elif beside.is_file():
        path, config = beside, read_object(beside)
    else:
        return None
    start, kind = config.get("init_lora_weights"), config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"{path}: {_error(f'an adapter of the kind {kind}', 'LoRA')}")
    with file_errors(path):
        values = (config["r"], config["lora_alpha"], *(config.get("rank_pattern") or {}).values())
        values += tuple((config.get("alpha_pattern") or {}).values())
        if not all(isinstance(value, int | float) and 0 < value < math.inf for value in values):
            raise ValueError(f"ranks and alphas {values}")
        for pattern in (*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})):
            re.compile(pattern)
    if isinstance(start, str) and start.lower() not in (*IDENTITY_INITS, "eva"):
        got = f"init_lora_weights={start!r}, with which the base was changed, too"
        cure = "save it again by peft's save_pretrained(path_initial_model_for_weight_conversion=...)"
        raise ValueError(f"{path}: {_error(got, 'a LoRA of the unchanged base', cure)}")
    for key, value in unsupported_fields(config).items():
        raise ValueError(f"{path}: {_error(f'{key}={value!r}', 'plain LoRA or DoRA')}")
    return config


def unsupported_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a LoraConfig that ask for more than plain LoRA or DoRA."""
    asked = {key: value for key, value in config.items() if value and key not in WITHOUT_EFFECT}
    return {key: value for key, value in asked.items() if (key, value) != ("bias", "none")}


def _group_by_layer(
    tensors: dict[str, torch.Tensor], sizes: Sizes | None, is_own: bool
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Return each layer's tensors by part, as in `PARTS`, and each layer's name in the file.

    is_own: the file is a run's checkpoint, which has the layers' names as they are.
    """
    family = family_of_layers(sizes or ())
    known = {family.original_name(name): name for name in sizes} | {name: name for name in sizes} if family else {}
    flat = {given.replace(".", "_"): name for given, name in known.items()}
    layers, names, adapters, unknown = defaultdict(dict), {}, set(), []
    renamed = convert_unet_state_dict_to_peft(tensors)
    if len(renamed) < len(tensors):
        raise _error("tensors under diffusers' names of today and of before", "each once", "leave one set out")
    for key, tensor in renamed.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise _error(_foreign_format(key, family) or f"{key}, which belongs to no LoRA", "a LoRA")
        given, part, adapter = match[1], PARTS[match[2]], match[3]
        name = next(_matching_layers(given, flat, known if sizes else None, is_own), None)
        if name is None:
            unknown.append((key, given))
            continue
        adapters |= {adapter} - {None}
        if part in layers[name]:
            raise _error(f"two tensors for {part} of {name}", "one", "leave one of them out")
        layers[name][part], names[name] = tensor, given
    if unknown:
        key, given = unknown[0]
        got = _foreign_format(key, family) or "layers that this transformer does not have"
        raise _error(f"{got}, {len({given for _, given in unknown})} of them, such as {given}", "layers of this model")
    if len(adapters) > 1:
        raise _error(f"{len(adapters)} adapters, {', '.join(sorted(adapters))}", "one", "save one of them alone")
    return layers, names


def _matching_layers(given: str, flat: dict[str, str], known: dict[str, str] | None, is_own: bool) -> Iterator[str]:
    """Yield the model's layer that a key may mean. known: layers by all their names, with dots."""
    name = _strip_prefixes(given)
    if name in known if known is not None else is_own or name.startswith("transformer_blocks.") or name != given:
        yield known[name] if known is not None else name
    for prefix in FLAT_PREFIXES:
        name = given.removeprefix(prefix).lstrip("_")  # VideoX-Fun has one more
        if given.startswith(prefix) and name in flat:
            yield flat[name]


def _strip_prefixes(name: str) -> str:
    """Return a layer's name without the prefixes of all formats."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _foreign_format(key: str, family: ModelFamily | None) -> str | None:
    """Return the name of another format, or of a LoRA for another family than the model's."""
    own = family and f"LoRA of {family.name}"
    return next((name for pattern, name in FOREIGN.items() if name != own and re.search(pattern, key)), None)


def _read_layer(
    name: str, parts: dict[str, torch.Tensor], config: dict | None, sizes: Sizes | None, given: str
) -> LoraLayer:
    """Return a layer of the file; raise ValueError for what is missing, wrong or not finite."""
    for part in ("a", "b"):
        if part not in parts:
            raise _error(f"no lora_{part.upper()} for {name}", "both halves of each layer", "the file is incomplete")
    for part, tensor in parts.items():
        if not tensor.is_floating_point() and part != "alpha":
            raise _error(f"{tensor.dtype} in {part} of {name}", "floating-point numbers")
        if not _at_least_float32(tensor).isfinite().all():
            raise _error(f"NaN or infinity in {part} of {name}", "finite weights", "train again, or take another")
    parts = {part: _at_least_float32(tensor) for part, tensor in parts.items()}
    a, b, magnitude = parts["a"], parts["b"], parts.get("magnitude")
    shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)} for {name}"
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        raise _error(shapes, "(r, in) and (out, r) of one rank r", "the file is damaged or of another kind")
    if sizes is not None and (len(b), a.shape[1]) != sizes[name]:
        raise _error(f"another model's adapter: {shapes}", f"an adapter of this model, where it is {sizes[name]}")
    if magnitude is not None and magnitude.numel() != len(b):
        raise _error(f"{magnitude.numel()} magnitudes for {name}", f"{len(b)}")
    if config is not None and bool(config.get("use_dora")) != (magnitude is not None):
        raise _error(f"use_dora={config.get('use_dora')!r} for {name}", "magnitudes where it is set, and only there")
    alpha = _alpha(name, len(a), parts.get("alpha"), config, given)
    return LoraLayer(a, b, alpha, None if magnitude is None else magnitude.flatten())


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32, or in float64 if it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()  # float8 has no promotion


def _alpha(name: str, rank: int, given: torch.Tensor | None, config: dict | None, key: str) -> float:
    """Return alpha such that the scale is alpha / rank: the file's, or the rank if it has none.

    key: the layer in the file. A config's patterns are for its names, as the tool that trained it
    has them.
    """
    if given is not None and (given.numel() != 1 or given.item() <= 0):
        raise _error(f"alpha {given.tolist()} for {name}", "a number above 0")
    if config is None:
        return float(rank) if given is None else given.item()
    names = key.removeprefix(PREFIXES[0]) if key.startswith(PREFIXES[0]) else _strip_prefixes(key), name
    stated, alpha = (_by_pattern(config.get(f"{kind}_pattern") or {}, names) for kind in ("rank", "alpha"))
    stated, alpha = stated or config["r"], float(alpha or config["lora_alpha"])
    if stated != rank:
        raise _error(f"rank {rank} for {name}, and {stated} in its metadata", "one rank", "the file is inconsistent")
    alpha *= math.sqrt(rank) if config.get("use_rslora") else 1
    if given is not None and not math.isclose(given.item(), alpha, rel_tol=1e-3):
        raise _error(f"alpha {given.item():g} for {name}, and {alpha:g} in its metadata", "one alpha", "correct one")
    return alpha


def _by_pattern(patterns: dict[str, float], names: tuple[str, ...]) -> float | None:
    """Return the value of the pattern that matches the first of the names that one matches."""
    return next((patterns[key] for name in names if (key := get_pattern_key(patterns, name)) in patterns), None)
