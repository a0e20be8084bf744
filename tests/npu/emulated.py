"""Tests on the emulated NPU, started by test_npu.py with the stand-in's libraries."""

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from accelerate.state import AcceleratorState
from emulator import EmulatedNPU
from safetensors.torch import load_file
from tiny import tiny_conditioning, tiny_transformer
from tiny_clip import save_transformers_clip

from rewards import load_reward, reward_attribute
from rewards.catalogue import CATALOGUE
from rewards.common import preprocess
from rlhf.config import METHODS, RewardGradientConfig
from rlhf.device import describe, deterministic, peak_memory, pick_device, reset_peak_memory, synchronize
from rlhf.export import export_merged
from rlhf.method.options import SCORES_ALONE
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.device_check import check_device, distance

sys.path.insert(0, str(Path(__file__).parents[2]))
import demo
import train_rlhf

ATTEND, ATTEND_BACK = (f"npu.npu_fusion_attention_{name}.default" for name in ("v3", "grad_v3"))
SMALL = {
    "per_device_train_batch_size": 1,
    "eval_prompts": None,
    "eval_reward_funcs": [],
    "report_to": ["none"],
    "learning_rate": 1e-3,
}
NEEDS = dict.fromkeys(METHODS, {}) | {
    "draft_k": {"num_grad_steps": 2},
    "alignprop": {"num_grad_steps": 2},
    "uniform": {"num_grad_steps": 2},
    "drtune": {"num_grad_steps": 2},
    "listed": {"method_kwargs": {"steps": [0, 2]}},
    "prfl": {"reward_funcs": [f"{Path(__file__).parents[1]}/helpers/toy_rewards.py:calm"]},
    **dict.fromkeys(("nft", "flow_grpo"), {"per_device_train_batch_size": 2, "method_kwargs": {"group_size": 2}}),
}


@pytest.fixture(autouse=True)
def npu(monkeypatch):
    monkeypatch.setenv("USE_ASCEND_NPU", "1")
    # A codec makes much of a rounding, so the pixels are kept as they are.
    monkeypatch.setattr(demo, "write_video", lambda path, video, fps: torch.save(video, path))
    with EmulatedNPU() as emulated:
        yield emulated
    AcceleratorState._reset_state(reset_partial_state=True)


def frames(path: Path) -> torch.Tensor:
    return torch.load(path).float()


def run(folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """Train nano and return the adapter."""
    settings = "--method draft_k --num_grad_steps 2 --max_steps 2 --per_device_train_batch_size 1 --learning_rate 1e-3"
    judged = "--save_steps 1 --eval_prompts none --eval_reward_funcs nano_verifier --report_to none"
    assert train_rlhf.main([*f"{settings} {judged} --output_dir {folder}".split(), *more]) == 0
    return load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")


# ---------------------------------------- the commands


def test_the_demo_makes_the_video_of_the_cpu(npu, tmp_path):
    demo.main(["--output", str(tmp_path / "npu.mp4")])
    steps, layers = 4, 8
    assert npu.calls[ATTEND] >= steps * layers  # of both branches in one batch; text encoders and VAE attend, too
    calls = sum(npu.calls.values())
    demo.main(["--device", "cpu", "--output", str(tmp_path / "cpu.mp4")])
    assert sum(npu.calls.values()) == calls, "nothing of the CPU's video was made on the NPU"
    made, expected = frames(tmp_path / "npu.mp4"), frames(tmp_path / "cpu.mp4")
    assert expected.std() > 5
    assert (made - expected).abs().max() <= 1  # of 255: roundings to whole numbers


def test_nano_trains_resumes_to_the_bit_and_exports(npu, tmp_path):
    whole = run(tmp_path / "run")
    assert npu.calls[ATTEND_BACK] > 0
    assert npu.calls["aten._fused_adamw_.default"] == 2
    assert all(tensor.isfinite().all() for tensor in whole.values())
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "run", half)
    shutil.rmtree(half / "checkpoints" / "step-2")
    shutil.rmtree(half / "adapter")
    resumed = run(half, "--resume_from_checkpoint", "latest")
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())
    export_merged(tmp_path / "run", tmp_path / "merged")
    demo.main(["--lora", str(tmp_path / "run" / "adapter"), "--output", str(tmp_path / "adapter.mp4")])
    merged = {"--model_id": tmp_path / "merged", "--prompt": demo.PROMPTS["nano"], "--output": tmp_path / "merged.mp4"}
    demo.main([str(word) for flag in merged.items() for word in flag])
    assert (frames(tmp_path / "merged.mp4") - frames(tmp_path / "adapter.mp4")).abs().max() <= 1


# ---------------------------------------- gradients


def test_nanos_whole_gradient_is_the_cpus(npu):
    """The gradient goes through all steps, both branches of guidance, decoder and reward."""
    rows = {row.phase: row for row in check_device(torch.device("npu"), ["float32"])}
    assert rows["gradient"].difference < 1e-5
    assert all(row.passed for row in rows.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_every_method_is_the_cpus(tmp_path, method):
    """Compared is the optimizer's input: the first step of AdamW would magnify rounding."""
    args = RewardGradientConfig(max_steps=1, max_grad_norm=0, num_frames=5, method=method, **SMALL | NEEDS[method])
    got, expected = (
        gradient(dataclasses.replace(args, device=d, output_dir=str(tmp_path / d))) for d in ("npu", "cpu")
    )
    limit = 1e-4 if method in SCORES_ALONE else 1e-5  # the spread of a group divides the rounding of its scores
    assert 0 < distance(got, expected) < limit


def gradient(args) -> torch.Tensor:
    """Return the gradient of the first step at the whole adapter."""
    AcceleratorState._reset_state(reset_partial_state=True)
    seen, trainer = [], RewardGradientTrainer(args=args)
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(trainer.masters.vector.grad.clone()))
    trainer.train()
    assert seen[0].device.type == args.device
    return seen[0].cpu()


def test_every_attention_of_the_transformer_is_fused(npu):
    transformer, cond = tiny_transformer(num_layers=3).to("npu").requires_grad_(), tiny_conditioning().to("npu")
    latents = torch.randn(1, 16, 2, 4, 4).to("npu")
    npu.calls.clear()
    (video,) = transformer(
        latents, cond.prompt_embeds_BLD, cond.pooled_embeds_BP, torch.tensor([500.0]).to("npu"), return_dict=False
    )
    video.sum().backward()
    assert (npu.calls[ATTEND], npu.calls[ATTEND_BACK]) == (3, 3)
    assert not [name for name in npu.calls if "softmax" in name]


def test_resizing_is_matrix_products_with_the_gradient_of_the_cpu(npu):
    image = torch.rand(2, 3, 20, 30)
    results = {}
    for device in ("cpu", "npu"):
        pixels = image.detach().to(device).requires_grad_()
        resized = preprocess.preprocess(pixels, 8)
        resized.square().sum().backward()
        results[device] = resized.detach().cpu(), pixels.grad.cpu()
    torch.testing.assert_close(results["npu"], results["cpu"], rtol=1e-5, atol=1e-5)
    assert not [name for name in npu.calls if "upsample" in name]


@pytest.mark.parametrize("name", ["clip_score", *(name for name, entry in CATALOGUE.items() if not entry.weights)])
def test_rewards_and_their_gradients_are_the_cpus(name, tmp_path):
    settings = {"model": str(save_transformers_clip(tmp_path))} if name == "clip_score" else {}
    reward, video = load_reward(name, **settings), torch.rand(2, 3, 5, 40, 48)
    results = {}
    for device in ("cpu", "npu"):
        pixels = video.to(device, copy=True).requires_grad_()
        if isinstance(reward, torch.nn.Module):
            reward.to(device)
        scores = reward(pixels, ["a red fox", "rain"])
        if reward_attribute(reward, "differentiable"):
            scores.sum().backward()
        assert scores.device.type == device
        results[device] = scores.detach().cpu(), None if pixels.grad is None else pixels.grad.cpu()
    torch.testing.assert_close(results["npu"], results["cpu"], rtol=1e-4, atol=1e-6)


# ---------------------------------------- the device, and the emulation


def test_the_npu_is_chosen_and_set_up(monkeypatch):
    for switch in ("1", "0"):  # asked for, and as what the machine has
        monkeypatch.setenv("USE_ASCEND_NPU", switch)
        torch.npu.config.allow_internal_format = True  # can be set but not read
        torch.backends.mha.set_fastpath_enabled(True)
        assert pick_device().type == "npu"
        assert torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"disable"
        assert not torch.backends.mha.get_fastpath_enabled()
    assert pick_device("cpu").type == "cpu"
    assert describe(torch.device("npu")) == "Ascend910B2"


def test_memory_and_precision_are_the_devices_own():
    device = torch.device("npu")
    reset_peak_memory(device)
    tensor = torch.zeros(2**20, device=device)
    synchronize(device)
    assert peak_memory(device) >= tensor.nbytes
    torch.npu.conv.allow_hf32 = True
    with deterministic(device):
        assert not torch.npu.conv.allow_hf32
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.npu.conv.allow_hf32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("breach", "message"),
    [
        (lambda x: x.double(), "float64 tensor on the NPU"),
        (lambda x: torch.zeros(2, dtype=torch.float64, device="npu"), "float64 tensor on the NPU"),
        (lambda x: torch.complex(x, x), "complex64 tensor on the NPU"),
        (lambda x: x + torch.ones(2, 2), "tensors of the NPU and of cpu"),
        (lambda x: torch.randn(2, device="npu", generator=torch.Generator()), "enerator"),
        (lambda x: torch.linalg.eigh(x), "torch_npu has no kernel for aten::_linalg_eigh"),
        (lambda x: torch.ops.npu.npu_swiglu(x), "the emulated NPU has no npu::npu_swiglu"),
    ],
)
def test_the_emulation_is_strict(breach, message):
    x = torch.ones(2, 2, device="npu")
    with pytest.raises((TypeError, RuntimeError, NotImplementedError), match=message):
        breach(x)


def test_the_emulation_computes(npu):
    """Views, writes through views, reductions, random numbers and reading back."""
    x = torch.arange(6.0, device="npu").view(2, 3)
    x[0].mul_(10)
    assert x.t().cpu().tolist() == [[0, 3], [10, 4], [20, 5]]
    assert x.sum().item() == 42
    noise = torch.randn(1000, device="npu")
    assert 0.8 < noise.std().item() < 1.2
    mask = torch.rand(1, 1, 5, 5) > 0.5
    mask[..., 0] = True
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    out = F.scaled_dot_product_attention(q.to("npu"), k.to("npu"), v.to("npu"), mask.to("npu"))
    torch.testing.assert_close(out.cpu(), F.scaled_dot_product_attention(q, k, v, mask))
    assert npu.calls[ATTEND] == 1
