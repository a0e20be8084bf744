"""Imports are light, and no package with outdated pins is needed."""

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNWANTED = {"hpsv2", "hpsv3", "ImageReward", "image-reward", "imscore", "aesthetic_predictor_v2_5"}


def modules_after(code):
    """Return the modules loaded after `code` in a fresh interpreter."""
    code = f"import sys\n{code}\nprint(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(out.split())


def test_import_rewards_loads_no_framework():
    modules = modules_after("import rewards")
    assert "rewards" in modules
    assert not modules & {"torch", "torchvision", "transformers", "open_clip", "huggingface_hub"}


def test_import_rlhf_loads_no_framework_and_its_public_names_load_on_first_use():
    modules = modules_after("import rlhf")
    assert not modules & {"torch", "diffusers", "transformers", "rlhf.trainer"}
    names = "RewardGradientConfig, RewardGradientTrainer, load_pipeline"
    check = f"assert sorted(rlhf.__all__) == [x.__name__ for x in ({names})] and not hasattr(rlhf, 'torch')"
    modules = modules_after(f"import rlhf\nfrom rlhf import {names}\n{check}")
    assert {"rlhf.trainer", "rlhf.config", "rlhf.generator.loading"} <= modules


def test_settings_are_checked_before_the_libraries_that_take_seconds_are_imported():
    modules = modules_after("import rlhf.checks")
    assert "rlhf.checks" in modules
    assert not modules & {"diffusers", "transformers", "peft", "accelerate", "open_clip"}


def test_scores_are_compared_without_the_libraries_of_models():
    modules = modules_after("import rlhf.evaluation.paired_sets")
    assert "rlhf.evaluation.statistics" in modules
    assert not modules & {"diffusers", "transformers", "peft", "accelerate"}


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
