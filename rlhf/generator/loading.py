"""Load a pipeline by a name, a path or a hub id: `load_pipeline("nano")`.

A checkpoint has a folder per component, in diffusers layout. Its transformer's config.json names
the family (`rlhf.generator.registry`), whose classes are fixed. Weights in the wanted format are
mapped from their files, so they take no memory of their own until they move to a device.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError

from rlhf.generator.files import family_of_folder, model_folder, model_sizes, one_line
from rlhf.generator.pipeline import VideoPipeline
from rlhf.generator.registry import ModelFamily, SamplingDefaults, family_of_config

BF16_ABOVE_BYTES = 2 * 2**30  # of transformer weights on disk


@dataclass(frozen=True)
class Classes:
    """The classes of a family's components. load_scheduler: reads the scheduler's folder."""

    pipeline: type[VideoPipeline]
    transformer: type[torch.nn.Module]
    text_encoders: dict[str, type]
    tokenizers: dict[str, type]
    load_scheduler: Callable[[Path], FlowMatchEulerDiscreteScheduler]


@dataclass(frozen=True)
class Checkpoint:
    """A model's folder, of which a pipeline is loaded part by part.

    dtype: of the transformer and the text encoders; the VAE is always float32.
    """

    folder: Path
    dtype: torch.dtype

    @classmethod
    def find(cls, model: str | Path, dtype: torch.dtype | None = None) -> "Checkpoint":
        """Return a model's checkpoint. Arguments and errors are those of `load_pipeline`."""
        folder = model_folder(model)
        model_sizes(folder)  # refuses other architectures
        return cls(folder, dtype or default_dtype(folder))

    @property
    def family(self) -> ModelFamily:
        """The model's family."""
        return family_of_folder(self.folder)

    def open_pipeline(self) -> VideoPipeline:
        """Return the pipeline without weights: no encoders, transformer and VAE on "meta"."""
        classes, folder = self.family.classes, self.folder
        with torch.device("meta"):
            parts = {"transformer": classes.transformer, "vae": AutoencoderKLWan}
            empty = {name: cls.from_config(cls.load_config(folder / name)) for name, cls in parts.items()}
        pipe = classes.pipeline(
            **empty,
            scheduler=classes.load_scheduler(folder / "scheduler"),
            **dict.fromkeys(classes.text_encoders),
            **{name: load_config(cls, folder / name) for name, cls in classes.tokenizers.items()},
        )
        pipe.sampling = SamplingDefaults.load(folder, self.family.sampling)
        return pipe

    def load_encoder(self, name: str) -> torch.nn.Module:
        """Return one text encoder, on the CPU."""
        return _load_weights(self.family.classes.text_encoders[name], self.folder / name, spare=True, dtype=self.dtype)

    @contextmanager
    def lend_encoder(self, pipe: VideoPipeline, name: str, device: torch.device) -> Iterator[None]:
        """Have the pipeline hold a text encoder on the device while inside, and none after."""
        setattr(pipe, name, self.load_encoder(name).to(device))
        try:
            yield
        finally:
            setattr(pipe, name, None)

    def load_generator(self, pipe: VideoPipeline) -> None:
        """Give the pipeline its transformer and VAE, on the CPU."""
        pipe.transformer = load_transformer(self.folder, self.dtype)
        pipe.vae = _load_weights(AutoencoderKLWan, self.folder / "vae", dtype=torch.float32)


def load_pipeline(
    model: str | Path = "nano", dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> VideoPipeline:
    """Return a model's pipeline, frozen and in evaluation mode.

    `pipe.sampling` has the checkpoint's sampling defaults.

    Args:
        model: "nano", a folder, or a hub id, which is downloaded unless it is in the cache.
        dtype: of the transformer and the text encoders; the VAE is always float32. Default:
            bfloat16 for transformers of more than 2 GiB, else float32, for any dtype in the files.
        device: default: the CPU.

    Raises:
        ValueError: the model does not exist, lacks a component, or has other weights.
    """
    checkpoint = Checkpoint.find(model, dtype)
    pipe = checkpoint.open_pipeline()
    for name in pipe.family.text_encoders:
        setattr(pipe, name, checkpoint.load_encoder(name))
    checkpoint.load_generator(pipe)
    return pipe if device is None else pipe.to(device)


def load_transformer(folder: Path, dtype: torch.dtype | None = None) -> torch.nn.Module:
    """Return only the transformer of a checkpoint, as `load_pipeline` does, on the CPU."""
    dtype = dtype or default_dtype(folder)
    return _load_weights(family_of_folder(folder).classes.transformer, folder / "transformer", dtype=dtype)


def _load_weights(cls, folder: Path, spare: bool = False, **kwargs) -> torch.nn.Module:
    """Return a frozen component; raise ValueError if weights are missing (libraries only warn).

    spare: the files may have more weights, as those of text encoders do.
    """
    try:
        module, report = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **kwargs)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{folder} holds no readable safetensors weights ({one_line(error)}); check that the download is complete"
        ) from error
    unexpected = [] if spare else report["unexpected_keys"]
    if wrong := sorted({*report["missing_keys"], *unexpected}):
        raise ValueError(
            f"the weights in {folder} do not fit {cls.__name__}: {len(wrong)} keys are missing or unexpected, the "
            f"first is {wrong[0]}; check that the download is complete and its config.json belongs to it"
        )
    return module.eval().requires_grad_(False)


def load_config(cls, folder: Path):
    """Load a scheduler or tokenizer; raise ValueError if its files are not readable."""
    try:
        return cls.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no readable {cls.__name__} ({one_line(error)}); check that the download is complete"
        ) from error


def default_dtype(folder: Path) -> torch.dtype:
    """Return bfloat16 for large transformers, else float32."""
    size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
    return torch.bfloat16 if size > BF16_ABOVE_BYTES else torch.float32


def linear_sizes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return (out, in) of the linear layers of a transformer with this config, by name."""
    with torch.device("meta"):
        modules = family_of_config(config).classes.transformer.from_config(config).named_modules()
    return {name: tuple(module.weight.shape) for name, module in modules if isinstance(module, torch.nn.Linear)}
