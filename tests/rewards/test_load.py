"""Specs: built-in names, modules, files beside the config, entry points; errors."""

import functools
import importlib
import os
import random
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import numpy
import pytest
import torch
from huggingface_hub import errors
from tiny_judges import bert_tokenizer

from rewards import RewardError, built_in_names, check_spec, frames_needed, load_reward, reward_name
from rewards import load as load_module
from rewards.catalogue import CATALOGUE
from rewards.isolation import keep_process_state

SOURCE = """
import math
from math import sqrt as root
DEFAULT: float = 2.0
if DEFAULT > 1:
    WHEN = "big"

class Bright:
    frames = "first"
    def __init__(self, gain=DEFAULT):
        self.gain = gain
    def __call__(self, video, prompts, **info):
        return self.gain * video.mean(dim=(1, 2, 3, 4))

def dark(video, prompts, gain=1.0, **info):
    return -gain * video.mean(dim=(1, 2, 3, 4))

dark.frames = "first"
instance = Bright(3.0)
"""
VIDEO = torch.full((2, 3, 1, 4, 4), 0.5)
PROMPTS = ["a", "b"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def message(spec, base_dir=None, load=check_spec, **kwargs):
    with pytest.raises(RewardError) as caught:
        load(spec, base_dir, **kwargs)
    assert repr(spec) in str(caught.value)
    return str(caught.value)


def test_a_class_in_a_file_is_instantiated(folder):
    assert load_reward("mine.py:Bright", folder)(VIDEO, PROMPTS).tolist() == [1.0, 1.0]
    assert load_reward("mine.py:Bright", folder, gain=4.0)(VIDEO, PROMPTS).tolist() == [2.0, 2.0]


def test_what_a_constructor_raises_is_told_with_its_line(folder):
    (folder / "late.py").write_text("class Late:\n    def __init__(self, path='none.pt'):\n        open(path)\n")
    told = message("late.py:Late", folder, load_reward, path="there.pt")
    assert "FileNotFoundError" in told
    assert "for the arguments {'path': 'there.pt'}" in told
    assert "late.py, line 3)" in told
    assert "reward_kwargs" in told


def test_a_function_in_a_file_is_used_as_it_is(folder):
    assert not isinstance(load_reward("mine.py:dark", folder), functools.partial)
    assert load_reward("mine.py:dark", folder)(VIDEO, PROMPTS).tolist() == [-0.5, -0.5]


def test_a_function_with_arguments_keeps_its_attributes(folder):
    reward = load_reward("mine.py:dark", folder, gain=2.0)
    assert reward(VIDEO, PROMPTS, step=1).tolist() == [-1.0, -1.0]
    assert frames_needed(reward, 17) == 1


def test_an_instance_is_used_as_it_is(folder):
    assert load_reward("mine.py:instance", folder)(VIDEO, PROMPTS).tolist() == [1.5, 1.5]


def test_files_are_relative_to_base_dir_and_may_be_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    check_spec(f"{folder}/mine.py:Bright")
    check_spec(f"{folder.name}/mine.py:Bright")
    assert str(folder.parent / "mine.py") in message("mine.py:Bright")
    monkeypatch.setenv("HOME", str(folder))
    check_spec("~/mine.py:Bright")
    (folder / "mi:ne.py").write_text(SOURCE)
    check_spec("mi:ne.py:Bright", folder)


def test_files_of_one_name_are_modules_of_their_own(folder):
    """Found again by dataclasses and by pickling."""
    (folder / "other").mkdir()
    (folder / "other" / "mine.py").write_text(SOURCE)
    for reward in [load_reward("mine.py:Bright", place) for place in (folder, folder / "other")]:
        assert sys.modules[type(reward).__module__].Bright is type(reward)


def test_a_file_that_is_not_beside_the_config_is_looked_for_in_the_working_directory(folder, tmp_path, monkeypatch):
    """As prompt files are, so that a reward named by a flag is found where the command is given."""
    configs = tmp_path / "configs"
    configs.mkdir()
    monkeypatch.chdir(folder)
    assert load_reward("mine.py:Bright", configs)(VIDEO, PROMPTS).tolist() == [1.0, 1.0]
    (configs / "mine.py").write_text(SOURCE.replace("DEFAULT: float = 2.0", "DEFAULT: float = 4.0"))
    assert load_reward("mine.py:Bright", configs)(VIDEO, PROMPTS).tolist() == [2.0, 2.0]
    said = message("absent.py:Bright", configs)
    assert f"no file at {configs / 'absent.py'} or {folder / 'absent.py'}; expected a Python file" in said


def test_a_module(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()
    assert load_reward("mine:Bright", gain=2.0)(VIDEO, PROMPTS).tolist() == [1.0, 1.0]


def test_an_entry_point(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    plugin = EntryPoint("shiny", "mine:Bright", load_module.ENTRY_POINT_GROUP)
    monkeypatch.setattr(load_module, "entry_points", lambda group, name=None: [plugin] if name != "shni" else [])
    assert load_reward("shiny", gain=2.0)(VIDEO, PROMPTS).tolist() == [1.0, 1.0]
    assert "'shiny'" in message("shni")


def test_an_unknown_name_gets_its_nearest_neighbour_and_the_list():
    said = message("clip_scor")
    assert "nearest name is 'clip_score'" in said
    assert all(name in said for name in built_in_names())
    assert message("clip_scor", load=load_reward) == said


def test_nothing_near_still_lists_the_built_ins():
    said = message("zzzzzz")
    assert "nearest" not in said
    assert "aesthetic" in said


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("absent.py:Bright", "no file at"),
        ("mine.py:Brihgt", "nearest name is 'Bright'"),
        ("mine.py:gain", "expected one of Bright, DEFAULT, WHEN, dark, instance, root"),  # not math
        ("mine.py", "expected the class or function in it, mine.py:Name. Name one of these: Bright, DEFAULT"),
        ("absent.py", "no file at"),
        ("no_such_package_here:Bright", "no module 'no_such_package_here'"),
        ("no_such_package_here.sub:Bright", "no module 'no_such_package_here.sub'"),
    ],
)
def test_wrong_specs_are_found_without_running_anything(folder, spec, part):
    assert part in message(spec, folder)


def test_a_syntax_error_is_named_with_its_line(tmp_path):
    (tmp_path / "bad.py").write_text("x = 1\ndef broken(:\n")
    assert "line 2" in message("bad.py:broken", tmp_path)


def test_checking_runs_nothing_and_imports_no_model(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text("raise SystemExit('ran')\nclass Reward: pass\n")
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    check_spec("slow.py:Reward", tmp_path)
    check_spec("clip_score")
    (tmp_path / "star.py").write_text("from somewhere import *\n")
    check_spec("star.py:Reward", tmp_path)  # which may be among them


MEAN = "\ndef reward(video, prompts, **info):\n    return video.mean(dim=(1, 2, 3, 4))\n"
AT_IMPORT = {  # what a file does when it is imported, and what the error says
    "fails": ("import a_package_not_there", "ModuleNotFoundError while importing it: .*'a_package_not_there'"),
    "exits": ("import sys\nsys.exit(3)", "SystemExit while importing it: 3; .* Move what it does as a program below"),
    "parses": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--foo', required=True)\np.parse_args()",
        "SystemExit while importing it: 2; .*__main__",
    ),
    "waits": ("import time\ntime.sleep(60)", r"no end of importing it after 0.05 s; .* raise reward_timeout"),
    "tries again": (
        "while True:\n    try:\n        1 / 0\n    except Exception:\n        pass",
        "no end of importing it",
    ),
}


@pytest.mark.parametrize("does", AT_IMPORT)
def test_an_import_that_fails_or_does_not_come_back_names_the_reward(tmp_path, does):
    source, got = AT_IMPORT[does]
    (tmp_path / "late.py").write_text(source + MEAN)
    with pytest.raises(RewardError, match=f"^reward 'late.py:reward': got {got}"):
        load_reward("late.py:reward", tmp_path, reward_timeout=0.05)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("import torch; torch.set_grad_enabled(False)", torch.is_grad_enabled),
        ("import torch; torch.set_default_dtype(torch.float64)", torch.get_default_dtype),
        ("import torch; torch.set_default_device('meta')", torch.get_default_device),
        ("import torch; torch.set_num_threads(torch.get_num_threads() + 1)", torch.get_num_threads),
        ("import os, tempfile; os.chdir(tempfile.gettempdir())", os.getcwd),
        ("import sys; sys.argv = ['other']", lambda: list(sys.argv)),
        ("import argparse; argparse.ArgumentParser().parse_args()", lambda: list(sys.argv)),
        ("import torch; torch.manual_seed(0)", lambda: torch.get_rng_state().tolist()),
        ("import random; random.seed(0)", random.getstate),
        ("import numpy; numpy.random.seed(0)", lambda: numpy.random.get_state()[1].tolist()),
        ("import torch; torch.set_float32_matmul_precision('high')", lambda: precision()),
        ("import torch; torch.backends.fp32_precision = 'tf32'", lambda: precision()),
        ("import torch; torch.backends.cudnn.allow_tf32 = False", lambda: precision()),
        ("import torch; torch.backends.cudnn.conv.fp32_precision = 'ieee'", lambda: precision()),
        ("import torch; torch.backends.cudnn.benchmark = True", lambda: torch.backends.cudnn.benchmark),
        ("import torch; torch.use_deterministic_algorithms(True)", torch.are_deterministic_algorithms_enabled),
        ("import torch; torch.backends.cuda.enable_flash_sdp(False)", torch.backends.cuda.flash_sdp_enabled),
    ],
)
@pytest.mark.parametrize("at", ["import", "construction"])
def test_the_code_of_a_reward_leaves_the_process_as_it_was(tmp_path, monkeypatch, before, now, at):
    monkeypatch.setattr(sys, "argv", ["train", "--max_steps", "3"])
    inside = f"class Reward:\n    def __init__(self):\n        {before}\n    __call__ = staticmethod(reward)\n"
    (tmp_path / "mine.py").write_text(before + MEAN if at == "import" else MEAN + inside)
    was = now()
    if at == "construction" and "argparse" in before:
        with pytest.raises(RewardError, match="SystemExit: 2 for the arguments"):
            load_reward("mine.py:Reward", tmp_path)
    else:
        load_reward("mine.py:reward" if at == "import" else "mine.py:Reward", tmp_path)
    assert now() == was


def precision() -> list:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    newer = [torch.backends.fp32_precision, *(backend.fp32_precision for backend in backends)]
    return [*newer, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32]


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="this machine has no accelerator")
def test_a_call_leaves_the_accelerators_random_numbers_as_they_were():
    device = torch.accelerator.current_accelerator()
    torch.manual_seed(1)
    expected = torch.rand(3, device=device).tolist()
    torch.manual_seed(1)
    with keep_process_state():
        torch.rand(5, device=device)
    assert torch.rand(3, device=device).tolist() == expected


def test_a_construction_that_does_not_come_back_names_the_reward(tmp_path):
    (tmp_path / "late.py").write_text("import time\nclass Late:\n    def __init__(self):\n        time.sleep(60)\n")
    with pytest.raises(RewardError, match=r"^reward 'late.py:Late': got no end of constructing it after 0.05 s"):
        load_reward("late.py:Late", tmp_path, reward_timeout=0.05)


def test_a_reward_under_another_name(folder):
    assert reward_name("gain3=mine.py:Bright") == "gain3"
    assert reward_name("./a=b.py:Bright") == "Bright"
    assert load_reward("gain3=mine.py:Bright", folder, gain=3.0)(VIDEO, PROMPTS).tolist() == [1.5, 1.5]
    with pytest.raises(RewardError, match="^reward 'large': .*`model` in reward_kwargs.large to a local path"):
        load_reward("large=clip_score")
    with pytest.raises(RewardError, match="^reward 'mine.py:Brihgt': .*nearest name is 'Bright'"):
        check_spec("b=mine.py:Brihgt", folder)


def test_paths_in_arguments_are_relative_to_base_dir(folder, monkeypatch):
    """Texts that are no path, or of no file there, stay."""
    monkeypatch.chdir(folder.parent)
    (folder / "sub").mkdir()
    for name in ("sub/head.pt", "head.pt", "quality"):
        (folder / name).touch()
    source = "class Keep:\n    def __init__(self, **given):\n        self.given = given\n    def __call__(self): pass\n"
    (folder / "keep.py").write_text(source)
    given = {"a": "sub/head.pt", "b": ["head.pt", {"c": "./head.pt"}], "d": "quality", "e": "org/model", "f": 3}
    given["g"] = "local-dir:sub/head.pt"
    found = load_reward("keep.py:Keep", folder, **given).given
    head = str(folder / "head.pt")
    inner = str(folder / "sub" / "head.pt")
    assert found == given | {"a": inner, "b": [head, {"c": head}], "g": f"local-dir:{inner}"}
    long = {"prompt": "a/" * 5000}
    assert load_reward("keep.py:Keep", folder, **long).given == long


def test_a_file_may_name_its_encoding(tmp_path):
    text = "# -*- coding: latin-1 -*-\ndef grün(video, prompts, **info):\n    return video[:, 1].mean((1, 2, 3))\n"
    (tmp_path / "green.py").write_bytes(text.encode("latin-1"))
    assert load_reward("green.py:grün", tmp_path)(VIDEO, PROMPTS).shape == (2,)
    (tmp_path / "green.py").write_bytes(text.partition("\n")[2].encode("latin-1"))
    assert "a syntax error in" in message("green.py:grün", tmp_path)


def test_a_package_or_a_plug_in_that_does_not_import_is_named(folder, monkeypatch):
    (folder / "broken").mkdir()
    (folder / "broken" / "__init__.py").write_text("1 / 0\n")
    (folder / "broken" / "reward.py").write_text("class Reward: pass\n")
    monkeypatch.syspath_prepend(folder)
    assert "ZeroDivisionError while importing it" in message("broken.reward:Reward")
    plugin = EntryPoint("shiny", "a_package_not_there:Bright", load_module.ENTRY_POINT_GROUP)
    monkeypatch.setattr(load_module, "entry_points", lambda group, name=None: [plugin])
    assert "ModuleNotFoundError while importing it" in message("shiny", load=load_reward)


@pytest.mark.parametrize("name", ["Bright", "dark"])
def test_misspelt_arguments_name_the_nearest(folder, name):
    said = message(f"mine.py:{name}", folder, load=load_reward, gian=1.0)
    assert "gian" in said
    assert "nearest name is 'gain'" in said


def test_what_is_not_callable_is_refused(folder):
    assert "expected a callable" in message("mine.py:WHEN", folder, load=load_reward)
    assert "expected arguments for" in message("mine.py:dark", folder, load=load_reward, prompts=["a"])


def test_what_the_constructor_of_a_built_in_raises_names_it_and_its_arguments():
    with pytest.raises(
        RewardError, match="'clip_score': got .*Error.* for the arguments {'model': 3}.*; expected ClipS"
    ):
        load_reward("clip_score", model=3)


# ---------------------------------------- weights

NOT_WEIGHTS = {"tensors": {"a": torch.zeros(2)}, "nested": {"weights": {"a": torch.zeros(2)}}, "list": [torch.zeros(2)]}
FILES = {
    "aesthetic": "head",
    "aesthetic_v1": "head",
    "hps_v2_1": "checkpoint",
    "hps_v3": "checkpoint",
    "motion_degree": "weights",
    "viclip": "checkpoint",
    "video_align": "checkpoint",
}


@pytest.mark.parametrize("content", NOT_WEIGHTS)
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_layout_is_refused_in_one_way(tmp_path, name, content):
    torch.save(NOT_WEIGHTS[content], tmp_path / "file.pt")
    with pytest.raises(
        RewardError, match=rf"^reward '{name}': got .*; expected .*\. Use (the published|a raft|ViClip)"
    ):
        load_reward(name, **{FILES[name]: str(tmp_path / "file.pt")})


@pytest.mark.parametrize("name", [*FILES, "image_reward", "mps"])
def test_a_pickled_module_is_refused(tmp_path, name):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    settings = {"tokenizer": bert_tokenizer()} if name in ("image_reward", "mps") else {}
    said = message(name, load=load_reward, **{FILES.get(name, "checkpoint"): str(tmp_path / "module.pt")}, **settings)
    for words in ["a pickled module", "run code from the file", "MPS_overall.pth" if name == "mps" else ""]:
        assert words in said


@pytest.mark.parametrize(
    ("name", "setting", "parts"),
    [
        ("aesthetic", "head", ["trl-lib/ddpo-aesthetic-predictor, aesthetic-model.pth: 3.7 MB, Apache-2.0"]),
        ("aesthetic_v1", "head", ["LAION-AI/aesthetic-predictor, sa_0_4_vit_l_14_linear.pth: 4 kB, MIT"]),
        ("aesthetic_v2_5", "head", ["aesthetic_predictor_v2_5.pth: 2.6 MB, AGPL-3.0", "never downloaded"]),
        ("background_consistency", "model", ["openai/clip-vit-base-patch32", "605 MB", "MIT"]),
        ("hps_v2", "checkpoint", ["xswu/HPSv2, HPS_v2_compressed.pt: 2.0 GB, Apache-2.0"]),
        ("hps_v2_1", "checkpoint", ["xswu/HPSv2, HPS_v2.1_compressed.pt: 2.0 GB, Apache-2.0"]),
        ("hps_v3", "checkpoint", ["MizzenAI/HPSv3, HPSv3.safetensors: 16.6 GB, MIT"]),
        ("image_reward", "tokenizer", ["no tokenizer of 'bert-base-uncased'", "the tokenizer, under 1 MB"]),
        ("image_reward", "checkpoint", ["THUDM/ImageReward, ImageReward.pt: 1.8 GB, Apache-2.0"]),
        ("mps", "tokenizer", ["no tokenizer of 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'", "under 20 MB, MIT"]),
        ("mps", "checkpoint", ["RE-N-Y/mpsv1, model.safetensors: 4.4 GB, MIT"]),
        ("pickscore", "model", ["yuvalkirstain/PickScore_v1: 3.9 GB, MIT"]),
        ("subject_consistency", "model", ["facebook/dino-vitb16", "343 MB", "Apache-2.0"]),
        (
            "viclip",
            "checkpoint",
            ["OpenGVLab/ViCLIP, ViClip-InternVid-10M-FLT.pth: 1.7 GB, MIT, gated"],
        ),
        ("video_align", "checkpoint", ["KwaiVGI/VideoReward, checkpoint-11352/model.pth: 5.0 GB, MIT"]),
        ("video_score", "model", ["TIGER-Lab/VideoScore-v1.1: 16.5 GB, MIT"]),
        ("vjepa2", "model", ["facebook/vjepa2-vitl-fpc64-256: 1.3 GB, MIT"]),
    ],
)
def test_missing_weights_are_named(name, setting, parts):
    needs_tokenizer = name in ("image_reward", "mps") and setting == "checkpoint"
    settings = {"tokenizer": bert_tokenizer()} if needs_tokenizer else {}
    said = message(name, load=load_reward, **settings)
    for part in [*parts, f"`{setting}` in reward_kwargs.{name}"]:
        assert part in said
    if setting == "checkpoint":
        assert "no file at /nowhere/x.pt" in message(name, load=load_reward, checkpoint="/nowhere/x.pt", **settings)


@pytest.mark.parametrize(("name", "from_transformers"), [("viclip", False), ("pickscore", True)])
@pytest.mark.parametrize("kind", ["gated", "absent", "offline"])
def test_a_hub_that_refuses_is_told_from_none(monkeypatch, name, kind, from_transformers):
    response = SimpleNamespace(headers={}, request=None)
    gated, absent = errors.GatedRepoError("403 Client Error", response=response), errors.RepositoryNotFoundError
    raised = {"gated": gated, "absent": absent("404 Client Error", response=response)}
    raised["offline"] = errors.LocalEntryNotFoundError("no connection")

    def download(*_, **__):
        if not from_transformers:
            raise raised[kind]
        raise OSError("as transformers says it") from raised[kind]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", download)
    said = message(name, load=load_reward)
    assert ("it is gated" in said) == (kind == "gated")
    assert ("none of this name" in said) == (kind == "absent")
    assert ("o online once" in said) == (kind == "offline")
    page = f"ccept its terms at https://huggingface.co/{CATALOGUE[name].weights[0]}"
    assert (page in said) == (kind == "gated" or (kind == "offline" and name == "viclip"))
    assert f"in reward_kwargs.{name} to a local path" in said


@pytest.mark.parametrize("value", [0, -1, "4", float("nan")])
@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, "chunk") for name in ("clip_score", "hps_v3", "motion_degree", "subject_consistency")),
        *((name, "chunk") for name in ("viclip", "video_align", "video_score", "vjepa2")),
        ("motion_degree", "temperature"),
        ("motion_degree", "num_flow_updates"),
        ("video_align", "fps"),
        ("video_score", "max_frames"),
        ("vjepa2", "fps"),
    ],
)
def test_a_setting_that_has_to_be_above_0_is_named_before_weights_are_looked_for(name, setting, value):
    with pytest.raises(RewardError, match=f"^reward '{name}': got {setting}=.*; expected a number above 0"):
        load_reward(name, **{setting: value})
