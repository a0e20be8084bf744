"""Heads on the first blocks: features against the model's own, files, gradients, other bases refused."""

from types import SimpleNamespace

import pytest
import torch
from problem import keep_float64
from safetensors.torch import save_file
from tiny import tiny_conditioning, tiny_transformer
from tiny_wan import tiny_wan_conditioning, tiny_wan_transformer

from rewards import RewardError, load_reward, probe
from rewards.models.latent_reward import HeadFacts, LatentHead, read_facts, save_head
from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.evaluation.statistics import rank_correlation
from rlhf.execution.blocks import BlockRunner
from rlhf.generator.files import NANO_PATH, latent_sizes, model_sizes, transformer_digest
from rlhf.generator.first_blocks import FirstBlocks, first_blocks, load_first_blocks
from rlhf.generator.loading import load_transformer


class Spy(BlockRunner):
    """Keeps the video tokens after each block."""

    def __call__(self, *inputs):
        text, video = super().__call__(*inputs)
        self.seen = [*getattr(self, "seen", []), video]
        return text, video


@pytest.mark.parametrize(
    ("make", "conditioning"), [(tiny_transformer, tiny_conditioning), (tiny_wan_transformer, tiny_wan_conditioning)]
)
def test_features_are_the_video_tokens_after_a_block_and_their_gradient_is_exact(make, conditioning, monkeypatch):
    keep_float64(monkeypatch)
    normal = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)
    cond, x = conditioning(batch=2, dtype=torch.float64), normal(2, 16, 2, 4, 4).requires_grad_()
    text = cond.prompt_embeds_BLD, cond.pooled_embeds_BP
    whole = make(num_layers=3).double()
    whole.run_block = Spy(parts=whole.block_parts)
    whole(x, *text, torch.full((2,), 700.0), return_dict=False)

    gradients = []
    for recompute in (True, False):
        cut = make(num_layers=3).double()
        del cut.transformer_blocks[2:]
        blocks = FirstBlocks(cut, recompute)
        tokens = blocks(x, 0.7, *text)
        assert tokens.shape[-1] == blocks.width
        torch.testing.assert_close(tokens, whole.run_block.seen[1])
        weight, direction = normal(*tokens.shape), normal(*x.shape, 1).squeeze(-1)
        gradients.append(torch.autograd.grad((tokens * weight).sum(), x)[0])
    with torch.no_grad():
        ahead, behind = ((blocks(x + h * direction, 0.7, *text) * weight).sum() for h in (1e-5, -1e-5))
    assert torch.equal(*gradients)
    torch.testing.assert_close((gradients[0] * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-8)


def test_only_the_first_blocks_are_loaded_and_they_are_the_generators():
    cut, whole = load_first_blocks("nano", 2), load_transformer(NANO_PATH)
    assert len(cut.transformer_blocks) == 2
    weights = whole.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in cut.state_dict().items())
    for count in (0, 7):
        with pytest.raises(ValueError, match=f"blocks: got {count}, expected 1 to 6"):
            first_blocks(model_sizes("nano")["transformer"], count)


def write_head(path, model="nano", digest=None, blocks=2):
    torch.manual_seed(0)
    head = LatentHead(160).requires_grad_(False)
    facts = HeadFacts(
        str(model), digest or transformer_digest("nano"), blocks, {"reward_funcs": ["x"]}, 0.3, 0.1, {"n": 5}
    )
    save_head(path, head, facts)
    return head, facts


def test_a_head_is_read_as_it_was_written_and_keeps_the_contract(tmp_path):
    path = tmp_path / "head.safetensors"
    head, facts = write_head(path)
    assert read_facts(path) == facts
    reward = load_reward("latent_reward", path=str(path))
    assert (reward.mean, reward.std, reward.space) == (0.3, 0.1, "latents")
    report = probe(reward, (3, 5, 16, 32), latents=latent_sizes(model_sizes("nano")))
    assert min(report.grad_norms) > 0
    x, text, pooled = torch.randn(2, 16, 2, 4, 4), torch.randn(2, 6, 128), torch.randn(2, 128)
    expected = 0.3 + 0.1 * head(FirstBlocks(load_first_blocks("nano", 2))(x, 0.4, text, pooled), 0.4)
    assert torch.equal(reward(x, ["a", "b"], sigma=0.4, text=text, pooled=pooled, fps=8), expected)
    assert not torch.equal(reward(x, ["a", "b"], sigma=0.9, text=text, pooled=pooled), expected)


def test_a_head_of_another_base_or_file_is_refused_in_words(tmp_path):
    path = tmp_path / "head.safetensors"
    refused = lambda **kwargs: pytest.raises(RewardError, **kwargs)
    with refused(match="no file .*; expected a head that `python -m rewards.distill` wrote"):
        load_reward("latent_reward", path=str(path))
    with refused(match="got no `path`"):
        load_reward("latent_reward")
    save_file({"x": torch.zeros(1)}, path)
    with refused(match="of format None; expected a head"):
        load_reward("latent_reward", path=str(path))
    args = RewardGradientConfig(reward_funcs=["latent_reward"], reward_kwargs={"latent_reward": {"path": str(path)}})
    with pytest.raises(ConfigError, match="of format None; expected a head"):
        check_config(args)
    write_head(path, digest="0" * 64)
    with refused(
        match="the model nano, whose transformer is not the one that the head was distilled on; expected nano"
    ):
        load_reward("latent_reward", path=str(path))
    write_head(path)
    reward = load_reward("latent_reward", path=str(path))
    with refused(match="a run on other, whose transformer is not .*Distill a head on this base"):
        reward.check_generator("other", "1" * 64)


def test_the_digest_is_of_the_weights_and_not_of_where_they_are():
    nano, other = (SimpleNamespace(transformer=x) for x in (load_transformer(NANO_PATH), tiny_transformer()))
    assert transformer_digest("", nano) == transformer_digest("nano") != transformer_digest("", other)
    nano.transformer.transformer_blocks[5].attn.to_q.weight[0, 3] += 1e-3
    assert transformer_digest("", nano) != transformer_digest("nano")


def test_rank_correlation_shares_the_ranks_of_equal_values():
    a = torch.tensor([3.0, 1.0, 2.0, 5.0])
    assert rank_correlation(a, a.exp()) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # ranks 2.5, 0, 1, 2.5 beside 0, 1, 2, 3: covariance 0.75 / (sqrt(1.125) sqrt(1.25))
    b = torch.tensor([7.0, 0.0, 1.0, 7.0])
    ranks = torch.tensor([[2.5, 0, 1, 2.5], [0, 1, 2, 3]]).double()
    assert rank_correlation(b, torch.arange(4.0)) == pytest.approx(torch.corrcoef(ranks)[0, 1].item())
    assert rank_correlation(torch.ones(4), a) == 0
