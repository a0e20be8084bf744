"""Pictures to preprocess, and the two PIL pipelines that most models are published with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Resize

DATA = Path(__file__).parents[3] / "shared" / "data"


def photograph(width, height):
    if not (DATA / "franz-kafka.jpg").exists():
        pytest.skip("no photograph in ../shared/data")
    image = Image.open(DATA / "franz-kafka.jpg").convert("RGB")
    return image.resize((width, height), Image.Resampling.LANCZOS)


def noise(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def to_float(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


def by_pil(image, size, fit):
    """Preprocess as published: torchvision's transforms on PIL images, as in CLIP and open_clip.

    The resize is made width first, in two calls, as PIL did up to version 12. Newer ones go height
    first where that is cheaper, which moves single pixels of some tall images by up to 8/255.
    """
    target = Resize(size if fit == "shortest" else (size, size))(image).size
    narrowed = image.resize((target[0], image.height), Image.Resampling.BICUBIC)
    return to_float(CenterCrop(size)(narrowed.resize(target, Image.Resampling.BICUBIC)))
