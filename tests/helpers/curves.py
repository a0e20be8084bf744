"""Twenty steps of nano by every method, as curves to compare with.

`python tests/helpers/curves.py [NAMES]` writes tests/curves/NAME.cpu.json anew; look at the
difference before keeping it. NAME.cuda.json are of an NVIDIA H200 (torch 2.11).
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from toy_rewards import ROBUST

from rlhf.config import RewardGradientConfig
from rlhf.io import write_rows
from rlhf.nano import world
from rlhf.prompts import load_prompts
from rlhf.run.metrics import read_metrics
from rlhf.run.video import to_uint8
from rlhf.trainer import RewardGradientTrainer

FOLDER = Path(__file__).parents[1] / "curves"
KEYS = ("loss", "reward", "grad_norm")
STEPS = 20
# Small and short, so that all of them take a minute on one core.
COMMON = {
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 3,
    "per_device_train_batch_size": 1,
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "adam_epsilon": 1e-5,  # above rounding, so that other processors draw the same curve
    "eval_prompts": "none",
    "report_to": ["none"],
}
CURVES = {
    "draft_k": {},
    "draft_k_all": {"num_grad_steps": 3},
    "draft_lv": {"method": "draft_lv"},
    "alignprop": {"method": "alignprop", "num_grad_steps": 3},
    "uniform": {"method": "uniform", "num_grad_steps": 2},
    "listed": {"method": "listed", "method_kwargs": {"steps": [0, 2]}},
    "drtune": {"method": "drtune", "num_grad_steps": 2, "method_kwargs": {"jump_steps": 2}},
    "refl": {"method": "refl", "method_kwargs": {"jump_steps": 2}},
    "srpo": {"method": "srpo"},
    "srpo_offline": {"method": "srpo", "method_kwargs": {"offline": True, "anchor_data_steps": 2}},
    "leap_align": {"method": "leap_align"},
    "prfl": {
        "method": "prfl",
        "reward_funcs": ["nano_preference", f"{Path(__file__).parent}/toy_rewards.py:calm"],
        "reward_weights": [1.0, 0.1],
    },
    "adjoint_matching": {"method": "adjoint_matching", "method_kwargs": {"reward_scale": 0.1}},
    "nft": {"method": "nft", "per_device_train_batch_size": 2, "method_kwargs": {"group_size": 2}},
    "flow_grpo": {
        "method": "flow_grpo",
        "per_device_train_batch_size": 2,
        "method_kwargs": {"group_size": 2, "kl_weight": 0.04},
    },
    "guidance_text": {"num_grad_steps": 2, "guidance_gradient": "text"},
    # At 1e-3 it meets a kink of the reward, where rounding moves a gradient by a tenth.
    "guidance_none": {"num_grad_steps": 2, "guidance_gradient": "none", "learning_rate": 5e-4},
    "distill": {
        "guidance_gradient": "distill",
        "drift_weight": 1.0,
        "learning_rate": 5e-4,  # for the same reason
    },
    "drift": {"drift_weight": 0.1, "anchor_steps": 5},
    "robust": ROBUST | {"reward_funcs": ["nano_preference", "nano_clip"], "learning_rate": 5e-4},
}


def draw(name: str, device: str = "cpu") -> dict[str, list[float]]:
    """The curves of one entry; steps without a reward leave none."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, CONTENTV_RLHF_CACHE=folder):
        args = RewardGradientConfig(output_dir=f"{folder}/run", device=device, **COMMON | CURVES[name])
        if name == "srpo_offline":
            args.anchor_data = str(draw_clips(Path(folder) / "videos"))
        prompts = None if name == "srpo_offline" else load_prompts("nano_train", None, 64)
        RewardGradientTrainer(args=args, train_dataset=prompts).train()
        rows = read_metrics(args.output_dir)
    return {key: [row[key] for row in rows if key in row] for key in KEYS}


def draw_clips(folder: Path) -> Path:
    """Write eight clips of nano's world as numbered pictures, which lose nothing; return the folder."""
    scenes = world.sample_scenes(8, torch.Generator().manual_seed(0))
    clips = to_uint8(world.render(scenes, COMMON["height"], COMMON["width"], COMMON["num_frames"]))
    for i, clip in enumerate(clips):
        (folder / f"{i}").mkdir(parents=True)
        for t, frame in enumerate(clip.permute(1, 2, 3, 0).numpy()):
            Image.fromarray(frame).save(folder / f"{i}" / f"{t}.png")
    write_rows(folder / "videos.jsonl", [{"file": f"{i}", "prompt": p} for i, p in enumerate(world.captions(scenes))])
    return folder


def stored(name: str, device: str = "cpu") -> dict[str, list[float]]:
    return json.loads(path(name, device).read_text())


def path(name: str, device: str) -> Path:
    return FOLDER / f"{name}.{device}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of CURVES; all by default")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name in arguments.names or CURVES:
        curves = draw(name, arguments.device)
        lines = [f'"{key}": {json.dumps([float(f"{v:.6g}") for v in values])}' for key, values in curves.items()]
        path(name, arguments.device).write_text("{\n  " + ",\n  ".join(lines) + "\n}\n")
        print(name, flush=True)


if __name__ == "__main__":
    main()
