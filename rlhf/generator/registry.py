"""The generators that the trainer knows, and the contract of their rooms.

A room such as `rlhf.contentv` has four files, and knows nothing of rewards and training:

    facts.py        FAMILY: files, sizes and defaults of its checkpoints. Imports no torch.
    transformer.py  the denoiser, a diffusers model with the attributes that `TRANSFORMER` lists
    pipeline.py     a `rlhf.generator.pipeline.VideoPipeline`
    classes.py      CLASSES: the classes that `rlhf.generator.loading` makes a pipeline of

TRANSFORMER, for latents (B, C, T, H, W):
    forward(latents, text_BLD, pooled_BP, timestep_B, joint_attention_kwargs=, return_dict=)
        The velocity. timestep = 1000 sigma. P is 0 where a model has no pooled text.
    transformer_blocks, block_parts   the blocks, and how `rlhf.execution.blocks` runs them
    run_block, sequence_group         set by `rlhf.execution.apply`
    position_bytes(tokens)            of a table of positions that it keeps
    trace_inputs(batch, latent_shape, text_tokens)   text, pooled text and timestep on "meta"
Layers are named to_q, to_k, to_v and to_out.0, as the default LoRA expects them.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf.io import read_object

ROOMS = ("rlhf.contentv", "rlhf.wan")  # the first has the checkpoints whose class is not known
CONTENTV_8B = "ByteDance/ContentV-8B"
DEFAULT_MODEL = CONTENTV_8B  # where a model or its sizes are not named
SAMPLING_FILE = "sampling.json"
T5_XXL = {  # sizes of the encoder of T5 v1.1 XXL, which several generators have
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class SamplingDefaults:
    """The recommended sampling of a checkpoint, from its sampling.json; defaults: ContentV-8B's."""

    height: int = 432  # pixels
    width: int = 768  # pixels
    num_frames: int = 125  # 4k + 1
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    fps: int = 24  # frames per second of the written video
    max_sequence_length: int = 256  # T5 tokens
    negative_prompt: str = ""

    def __post_init__(self):
        if not 1 <= self.fps <= 1000:
            raise ValueError(f"fps: got {self.fps}, expected at least 1 and at most 1000 frames per second; correct it")

    @classmethod
    def load(cls, folder: Path, default: "SamplingDefaults | None" = None) -> "SamplingDefaults":
        """Read folder/sampling.json; the default's values if the file or a key is missing."""
        path = Path(folder) / SAMPLING_FILE
        values = read_object(path) if path.exists() else {}
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path} has {unknown}, expected only {sorted(known)}; remove or rename these keys")
        return cls(**asdict(default or cls()) | values)

    def save(self, folder: Path) -> None:
        """Write the file folder/sampling.json."""
        (Path(folder) / SAMPLING_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def call_arguments(self) -> dict[str, Any]:
        """Return the defaults as keyword arguments of a pipeline's `__call__`."""
        return {key: value for key, value in asdict(self).items() if key != "fps"}


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of a generator's latents and text embeddings; the defaults are ContentV-8B's."""

    channels: int = 16
    halvings: int = 3  # of height and width, from pixels to latents
    halvings_of_time: int = 2
    text_width: int = 4096
    pooled_width: int = 2048

    def shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, H, W) of the latents of a video."""
        scale = 2**self.halvings
        return self.channels, 1 + (frames - 1) // 2**self.halvings_of_time, height // scale, width // scale


@dataclass(frozen=True)
class ModelFamily:
    """The checkpoints of one generator, as facts that need no torch.

    name: for tags and messages.
    room: its package.
    transformer_classes: in a checkpoint's config.json; exports name the first.
    config_files: of each component's folder.
    sizes: values of keys that a config file leaves out, by component.
    published: sizes of checkpoints that need neither files nor network, by hub id.
    text_encoders: configurations of the published encoders, for the planner.
    longest_encoder: the one whose tokens max_sequence_length counts.
    blocks: name of the transformer's list of blocks.
    text_widths: keys of the transformer's config: width of its text, and of its pooled text if any.
    card: sentences of an export's model card, by the kind of export.
    fixed: keys whose other values are another model, by component; "" is model_index.json.
    licences: by model, as a model card's header has them.
    renamed: parts of the layers' names, and what they are in the authors' code.
    """

    name: str
    room: str
    transformer_classes: tuple[str, ...]
    config_files: dict[str, str]
    sizes: dict[str, dict[str, Any]]
    published: dict[str, dict[str, dict[str, Any]]]
    text_encoders: dict[str, dict[str, Any]]
    longest_encoder: str
    blocks: str
    text_widths: tuple[str, ...]
    card: dict[str, str]
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    fixed: dict[str, dict[str, Any]] = field(default_factory=dict)
    licences: dict[str, dict[str, str]] = field(default_factory=dict)
    renamed: tuple[tuple[str, str], ...] = ()

    def encoder_tokens(self, card: dict[str, dict], max_sequence_length: int) -> dict[str, int]:
        """Return the tokens of a prompt, by encoder. card: of `model_sizes`."""
        others = card["tokenizer"]["model_max_length"]
        return {name: max_sequence_length if name == self.longest_encoder else others for name in self.text_encoders}

    def text_tokens(self, card: dict[str, dict], max_sequence_length: int) -> int:
        """Return the transformer's text tokens: the longest encoder's and the others'."""
        return max_sequence_length + (card["tokenizer"]["model_max_length"] if len(self.text_encoders) > 1 else 0)

    def original_name(self, layer: str) -> str:
        """Return a layer's name in the authors' own code."""
        for ours, theirs in self.renamed:
            layer = layer.replace(ours, theirs)
        return layer

    @property
    def classes(self) -> Any:
        """Return the room's `rlhf.generator.loading.Classes`, whose import takes seconds."""
        return import_module(f"{self.room}.classes").CLASSES


def families() -> list[ModelFamily]:
    """Return all families; the first is the default."""
    return [import_module(f"{room}.facts").FAMILY for room in ROOMS]


def family_of_config(transformer: dict[str, Any]) -> ModelFamily:
    """Return the family that has a transformer's config."""
    known = families()
    return next((f for f in known if transformer.get("_class_name") in f.transformer_classes), known[0])


def family_of_layers(layers: Iterable[str]) -> ModelFamily | None:
    """Return the one family whose transformer's blocks are named as in these layers, or None."""
    begins = {name.split(".", 1)[0] for name in layers}
    found = [family for family in families() if family.blocks in begins]
    return found[0] if len(found) == 1 else None


def spatial_patch(transformer: dict[str, Any]) -> int:
    """Return the edge of a transformer's spatial patch, in latent pixels, by its config."""
    size = transformer["patch_size"]
    return size if isinstance(size, int) else size[-1]
