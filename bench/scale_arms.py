"""The layouts that bench/scale.py measures, and a model with random weights in any of them."""

from dataclasses import replace
from types import SimpleNamespace

import torch
from step_arms import SIZES, Rig, Size, make_reward

from rlhf.config import RewardGradientConfig
from rlhf.device import deterministic, generator
from rlhf.distributed.layout import Layout
from rlhf.method.rollout import rollout

PROMPT = ["a red fox runs through deep snow, slow motion"]
INFO = {"fps": 24, "seed": 0, "step": 0}
ONE = "one device"
SETTINGS = {
    "gradient_checkpointing": True,
    "keep_attention": True,
    "vae_dtype": "bfloat16",
    "decode_chunk": 1,
    "decode_checkpoint": True,
}
SMALL = Size(SIZES["tiny"].transformer | {"num_attention_heads": 3}, SIZES["tiny"].vae, torch.float32, 6, 16, 48)


def arms(devices: int) -> dict[str, dict]:
    """Return the layouts of so many devices, as settings; heads and tokens may be padded."""
    if devices == 1:
        return {ONE: {}}
    found = {ONE: {}, "data": {}, "sequence": {"sequence_parallel": devices}}
    if devices % 2 == 0:
        found["guidance"] = {"guidance_parallel": 2}
    if devices % 4 == 0:
        found["guidance and sequence"] = {"guidance_parallel": 2, "sequence_parallel": devices // 2}
    if devices % 8 == 0:
        found["data, guidance and sequence"] = {"guidance_parallel": 2, "sequence_parallel": 2}
    return found | {"data, sharded base": {"shard_base": True}}


class Bench:
    """A model on all devices, whose layout can be changed."""

    def __init__(self, size: Size, frames: int, steps: int, scored: int, accelerator, settings: dict):
        self.accelerator, self.device, self.layouts = accelerator, accelerator.device, {}
        layout = Layout(RewardGradientConfig(**settings), accelerator)
        self.rig = Rig("scale", size, frames, steps, scored, self.device, layout, SETTINGS | settings)
        self.use({} if "shard_base" not in settings else settings)

    def use(self, settings: dict, alone: bool = False) -> None:
        """Run over the devices as these settings say, or on this one alone."""
        rig, name = self.rig, f"{settings} {alone}"
        rig.args = replace(rig.args, **{"guidance_parallel": 1, "sequence_parallel": 1} | settings)
        if name not in self.layouts:  # each has communicators, which take memory and time
            self.layouts[name] = Layout(rig.args, one_process(self.device) if alone else self.accelerator)
        self.layout = self.layouts[name]
        rig.transformer.sequence_group = self.layout.sequence_group
        rig.fields = rig.make_fields(self.layout)

    # ----------------------------------------------------------------------------------- the phases

    def sampling(self) -> None:
        """Take a denoising step without gradient."""
        with torch.no_grad():
            self._velocity()(self._noise(), self.rig.sigmas[0])

    def segment(self) -> None:
        """Take a denoising step forward and backward."""
        v = self._velocity()(self._noise().requires_grad_(), self.rig.sigmas[-2])
        v.backward(self.rig.noise("gradient"))
        self.rig.masters.collect_grad()

    def decode(self) -> None:
        """Decode and score forward and backward."""
        latents = self._noise().requires_grad_()
        video = self.rig.decode(self.layout.average_grad(latents), 0)
        video.backward(torch.ones_like(video))

    def sum(self) -> None:
        """Sum the gradient over processes and update the adapter."""
        rig, masters = self.rig, self.rig.masters
        masters.vector.grad = self.layout.accelerator.reduce(masters.vector.grad, "sum")
        masters.vector.grad.norm().item()
        rig.optimizer.step()
        rig.optimizer.zero_grad(set_to_none=False)
        masters.write()

    def _noise(self) -> torch.Tensor:
        """Another video's on each data rank."""
        return self.rig.noise(f"video {self.layout.process_index}")

    def _velocity(self):
        return self.rig.fields.window(self.rig.cond)

    # ------------------------------------------------------------------------------------- equality

    def train(self, videos: int, reward, steps: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the adapter's first gradient, and the adapter after the steps."""
        rig, layout, first = self.rig, self.layout, None
        share = videos // layout.num_processes
        for step in range(steps):
            for i in range(share * layout.process_index, share * (layout.process_index + 1)):
                noise = torch.randn(rig.shape, generator=generator("equality", step, i)).to(self.device)
                prefix, steps = rig.fields.tuned(rig.cond), [len(rig.sigmas) - 3, len(rig.sigmas) - 2]
                latents = rollout(prefix, self._velocity(), noise, rig.sigmas, steps)[-1]
                video = rig.decode(layout.average_grad(latents), step)
                (-reward(video, PROMPT, **INFO).mean() / videos).backward()
                rig.masters.collect_grad()
            gradient = layout.accelerator.reduce(rig.masters.vector.grad, "sum")
            first = gradient.clone() if first is None else first
            rig.masters.vector.grad = gradient
            rig.optimizer.step()
            rig.optimizer.zero_grad(set_to_none=False)
            rig.masters.write()
        return first, rig.masters.vector.detach().clone()


def one_process(device: torch.device):
    """Return a stand-in for the accelerator of a process that works alone."""
    return SimpleNamespace(
        device=device,
        num_processes=1,
        process_index=0,
        is_main_process=True,
        wait_for_everyone=lambda: None,
        reduce=lambda tensor, how: tensor,
        gather=lambda tensor: tensor,
    )


def equality(settings: dict, accelerator) -> dict:
    """Return the largest relative difference of the first gradient, and that of the weights."""
    device, processes = accelerator.device, accelerator.num_processes
    reward, own = make_reward("tiny", 1, device), {"vae_dtype": "float32", "attention_kernel": "default"}
    with deterministic(device):
        alone = Bench(SMALL, 9, 4, 9, accelerator, own)
        alone.use({}, alone=True)
        expected, expected_weights = alone.train(processes, reward)
        shared = Bench(SMALL, 9, 4, 9, accelerator, own | settings)
        shared.use(settings)
        gradient, weights = shared.train(processes, reward)
    of_gradient = ((gradient - expected).abs().max() / expected.abs().max()).item()
    return {"gradient": of_gradient, "weights": (weights - expected_weights).abs().max().item()}
