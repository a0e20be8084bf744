"""Imports are light, and no package with outdated pins is needed."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNWANTED = {"hpsv2", "hpsv3", "ImageReward", "image-reward", "imscore", "aesthetic_predictor_v2_5"}


NAMES = "RewardGradientConfig, RewardGradientTrainer, load_pipeline"
MODELS = {"diffusers", "transformers", "peft", "accelerate", "open_clip"}
LIGHT = {  # statements in their order in one interpreter, and what is not imported after each
    "import rewards": {"numpy", "torch", "torchvision", "huggingface_hub", *MODELS},
    "import rlhf": {"torch", "rlhf.trainer", *MODELS},
    "import rewards.list; rewards.list.main()": {"numpy", "torch", "torchvision", *MODELS},
    "import rewards; rewards.RewardMix, rewards.probe, rewards.load_reward('flicker')": {"torchvision", *MODELS},
    "import rlhf.checks": MODELS,
    "import rlhf.evaluation.paired_sets": MODELS,
}


@pytest.fixture(scope="module")
def modules_after():
    """The modules loaded after each statement, in a fresh interpreter."""
    check = f"sorted(rlhf.__all__) == [x.__name__ for x in ({NAMES})] and not hasattr(rlhf, 'torch')"
    statements = [*LIGHT, f"from rlhf import {NAMES}; assert {check}"]
    code = "import sys\n" + "".join(
        f"{statement}\nprint('Modules', *(name for name, module in sys.modules.items() if module))\n"
        for statement in statements
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line.split() for line in done.stdout.splitlines() if line.startswith("Modules")]
    return dict(zip(statements, told, strict=True))


@pytest.mark.parametrize("statement", LIGHT)
def test_an_import_loads_no_library_that_takes_seconds(modules_after, statement):
    assert re.search(r"import ([.\w]+)", statement)[1] in modules_after[statement]
    assert not LIGHT[statement].intersection(modules_after[statement])


def test_public_names_load_on_first_use_and_without_a_vendor(modules_after):
    modules = {*list(modules_after.values())[-1]}
    assert {"rlhf.trainer", "rlhf.config", "rlhf.generator.loading", "rlhf.device"} <= modules
    assert "torch_npu" not in modules


def test_no_file_names_a_generator_but_those_that_may():
    """Rooms, registry and the VAE that all share; the project's name and diffusers' are no generator's."""
    may = {"contentv", "wan", "registry.py", "wan_decoder.py", "wan_encoder.py", "frozen_layers.py"}
    may |= {"lora_file.py"}  # formats of files from elsewhere, by their names
    names = re.compile(r"(?i:contentv)|\b[Ww]an\b|\b_?wan[_\d]|Wan[A-Z\d]")
    others = r"contentv[-_]rlhf|contentv_reward_|contentv-nano|AutoencoderKLWan|wan_(de|en)coder|the Wan VAE's decoder"
    found = {}
    for path in (path for room in ("rewards", "rlhf") for path in (ROOT / room).rglob("*.py")):
        text = re.sub(others, "", path.read_text(), flags=re.IGNORECASE)
        if (hits := names.findall(text)) and not may.intersection(path.relative_to(ROOT).parts):
            found[str(path.relative_to(ROOT))] = hits
    assert not found


def test_nothing_imports_or_requires_the_published_reward_packages():
    files = [path for room in ("rewards", "rlhf", "bench", "tests") for path in (ROOT / room).rglob("*.py")]
    assert len(files) > 50
    imports = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(UNWANTED)})\b", re.MULTILINE)
    assert not [path for path in files if imports.search(path.read_text())]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    assert not [spec for spec in required if spec.lower().startswith(tuple(name.lower() for name in UNWANTED))]
