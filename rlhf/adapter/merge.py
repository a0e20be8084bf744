"""Loading a saved adapter into a transformer, and merging it into the weights for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from rlhf.adapter.scale import scaled
from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.io import file_errors

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
OLDER_BLOCKS_FILE = "trained_blocks.safetensors"  # beside the adapter in runs of older versions
EXPECTED = "expected an adapter of this model, as a run or pipe.save_lora_weights writes it; name the right one"


def load_adapter(transformer: SD3Transformer3DModel, folder: Path) -> None:
    """Add the adapter of a folder such as RUN/adapter; raise ValueError if it does not fit."""
    path = folder / ADAPTER_FILE
    with file_errors(path), safe_open(path, "pt") as file:
        file.keys()
    try:
        transformer.load_lora_adapter(folder, prefix="transformer", weight_name=ADAPTER_FILE, use_safetensors=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # of other shapes
        raise ValueError(f"{path}: got another model's adapter ({str(error)[:200]}), {EXPECTED}") from error
    require_adapter(transformer, path)


def refuse_trained_blocks(folder: str | Path) -> None:
    """Raise ValueError for a run that trained whole blocks, too: those are not loaded."""
    if (Path(folder) / OLDER_BLOCKS_FILE).exists():
        got = f"{folder}: got {OLDER_BLOCKS_FILE} of an older version, which trained blocks without an adapter, too"
        raise ValueError(f"{got}, expected an adapter alone; use that version, or train again without train_blocks")


def require_adapter(transformer: SD3Transformer3DModel, name: str | Path) -> None:
    """Raise ValueError if the adapter `name` has added no layer, of which peft only warns."""
    if not getattr(transformer, "peft_config", None):
        raise ValueError(f"{name}: got no layer of this transformer, {EXPECTED}")


@contextmanager
def merged(transformer: SD3Transformer3DModel, scale: float = 1.0) -> Iterator[SD3Transformer3DModel]:
    """Yield a plain transformer whose weights include `scale` times the adapter.

    Afterwards the weights are restored, bit for bit. The plain transformer shares its weights with
    the given one, so it is of use inside only.
    """
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    originals = [(p, p.detach().clone()) for layer in layers for p in layer.get_base_layer().parameters()]
    try:
        with scaled(transformer, scale):
            try:
                transformer.fuse_lora(safe_fusing=True)
                yield _strip_adapter(transformer)
            finally:
                for layer in (layer for layer in layers if layer.merged):
                    layer.unmerge()  # subtracts what was added, up to rounding
    finally:
        for parameter, original in originals:
            parameter.data.copy_(original)


def _strip_adapter(transformer: SD3Transformer3DModel) -> SD3Transformer3DModel:
    """Return a transformer without adapter layers that shares the base layers' weights."""
    weights = {k.replace(".base_layer.", "."): v for k, v in transformer.state_dict().items() if ".lora_" not in k}
    with torch.device("meta"):
        plain = SD3Transformer3DModel.from_config(transformer.config)
    plain.load_state_dict(weights, strict=True, assign=True)
    return plain.eval().requires_grad_(False)
