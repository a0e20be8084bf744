"""How far cheaper no-grad steps take a rollout from that of all steps, on nano without training.

    python bench/caching.py [--prompts 32] [--device cpu]     writes bench/results/caching.json

All arms sample with 25 steps, of which the last is as it is. `calls` are the forward passes of one
guidance branch before it, of 48, as the full-size model would count: its first block is one of 38.
`error` is the distance of the final latents from those of all steps, relative to their norm, and
`score` the mean of the trained reward.

"first block cache" runs the first block alone in a step whose first block changes its input by
nearly as much as in the last whole step, and adds what the other blocks added then (ParaAttention's
FBCache). diffusers' hooks of that kind fail at the last block of SD3's class, which has no text.

Rows of "guidance every n steps" are of a version that could keep v_text - v_neg over n steps: the
negative branch ran at every n-th alone.

The exponent of `shorten_prefix` is 1 where the steps kept are evenly spaced.

Prediction: a cached step is little more than a longer Euler step, so fewer steps are as near at
equal calls; guidance kept over two steps is nearer than either.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, show_row, write_rows
from guidance import make_trainer

from rlhf.execution.blocks import BlockRunner
from rlhf.generator.wan_decoder import decode_video
from rlhf.method.plan import Plan, shorten_prefix
from rlhf.method.rollout import draw_noise, rollout
from rlhf.method.velocity import velocity_field
from rlhf.trainer import RewardGradientTrainer

RESULT = Path(__file__).parent / "results" / "caching.json"
STEPS, FULL_SIZE_BLOCKS, BATCH = 25, 38, 16
BEFORE, NEVER, ALTERNATE = STEPS - 1, -1.0, -2.0  # steps before the window; thresholds
ARMS = {  # steps before the window, exponent, threshold of the cache
    "all steps": (BEFORE, 1, NEVER),
    **{f"{n} steps, exponent {power}": (n, power, NEVER) for n in (12, 8, 6) for power in (1, 1.5, 2)},
    **{f"first block cache, {threshold}": (BEFORE, 1, threshold) for threshold in (0.1, 0.15, 0.2, 0.3, 0.5)},
    "first block cache, every 2nd step": (BEFORE, 1, ALTERNATE),
}


class FirstBlockCache:
    """A `run_block` that skips all blocks but the first where that one adds nearly the same again.

    threshold: relative mean distance of the residuals, ALTERNATE for every second call, or NEVER.
    The two branches of guidance have separate caches; `branch` says which one runs.
    """

    recompute = "nothing"  # as in BlockRunner

    def __init__(self, run_block: Callable, blocks: torch.nn.ModuleList, threshold: float):
        self.run_block, self.first, self.last = run_block, blocks[0], blocks[-1]
        self.threshold, self.states, self.branch, self.calls = threshold, {}, None, 0.0

    def __call__(self, block, video, text, temb):
        """Run a block, or pass on what the cache has."""
        state = self.states.setdefault(self.branch, {})
        if block is self.first:
            head_text, head = self.run_block(block, video, text, temb)
            residual = head - video
            state["skip"] = "tail" in state and self._is_alike(residual, state)
            if not state["skip"]:
                state["residual"] = residual
            state["head"] = head
            self.calls += 1 / FULL_SIZE_BLOCKS if state["skip"] else 1
            return head_text, head
        if state["skip"]:
            return text, (state["head"] + state["tail"] if block is self.last else video)
        text, video = self.run_block(block, video, text, temb)
        if block is self.last:
            state["tail"] = video - state["head"]
        return text, video

    def _is_alike(self, residual: torch.Tensor, state: dict) -> bool:
        if self.threshold == ALTERNATE:
            return not state["skip"]
        before = state["residual"]
        return ((residual - before).abs().mean() / before.abs().mean()).item() < self.threshold


@torch.no_grad()
def sample(trainer: RewardGradientTrainer, prompts: list, noise: torch.Tensor, arm: str) -> tuple[torch.Tensor, float]:
    """Return final latents and the branch calls before the window."""
    steps, exponent, threshold = ARMS[arm]
    transformer, scale = trainer.pipe.transformer, trainer.args.guidance_scale
    plan = shorten_prefix(Plan(trainer.sigmas, [BEFORE]), steps, exponent)
    cond = trainer.text(prompts, trainer.device)
    cache = FirstBlockCache(BlockRunner(), transformer.transformer_blocks, threshold)

    def cached(latents, text, *rest, **more):
        cache.branch = text.data_ptr() == cond.prompt_embeds_BLD.data_ptr()
        return transformer(latents, text, *rest, **more)

    cached.dtype = transformer.dtype
    prefix = velocity_field(cached, cond, scale)
    transformer.run_block = cache
    state = rollout(prefix, prefix, noise, plan.sigmas[: plan.window_start + 1], [])[-1]
    transformer.run_block = None
    calls = cache.calls
    window = velocity_field(transformer, cond, scale)
    return rollout(window, window, state, plan.sigmas[plan.window_start :], [])[-1], calls


def measure(trainer: RewardGradientTrainer, arm: str, prompts: list, exact: list[torch.Tensor]) -> dict:
    """Return a row; `exact` is filled by the first arm, that of all steps."""
    errors, calls, scores = [], [], []
    for batch in range(len(prompts) // BATCH):
        rows = range(batch * BATCH, (batch + 1) * BATCH)
        some = [prompts[i] for i in rows]
        noise = draw_noise(trainer.batches.noise_shape, 0, "caching", [(i,) for i in rows]).to(trainer.device)
        latents, count = sample(trainer, some, noise, arm)
        if len(exact) <= batch:
            exact.append(latents)
        errors.append(((latents - exact[batch]).norm() / exact[batch].norm()).item())
        calls.append(count)
        with torch.no_grad():
            scores += trainer.rewards(decode_video(trainer.pipe.vae, latents), some)[0].tolist()
    mean = lambda values: sum(values) / len(values)
    return {"arm": arm, "calls": mean(calls), "error": mean(errors), "score": mean(scores), "videos": len(scores)}


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--device")
    parser.add_argument("--output", type=Path, default=RESULT)
    given = parser.parse_args(argv)
    trainer = make_trainer(given.device, num_inference_steps=STEPS, eval_prompts="nano_held_out")
    prompts, exact, rows = trainer.eval_prompts[: given.prompts], [], []
    for arm in ARMS:
        rows.append(measure(trainer, arm, prompts, exact))
        show_row(rows[-1])
    write_rows(given.output, environment(trainer.device), rows)


if __name__ == "__main__":
    main()
