"""What the text encoders take until the prompts are encoded."""

import torch
from tiny import MAX_TOKENS, tiny_pipeline

from rlhf.contentv.classes import CLASSES
from rlhf.contentv.facts import TEXT_ENCODERS
from rlhf.generator.registry import CONTENTV_8B
from rlhf.generator.text import ENCODE_BATCH
from rlhf.planner.text_encoders import encoder_configs, encoding_bytes

TOKENS = {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}


def test_the_published_ones_have_the_published_sizes():
    """Parameters of both CLIP text towers with their projections, and of T5's encoder."""
    expected = {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656}
    assert encoder_configs(CONTENTV_8B) is TEXT_ENCODERS
    for name, count in expected.items():
        cls = CLASSES.text_encoders[name]
        with torch.device("meta"):
            model = cls(cls.config_class.from_dict(TEXT_ENCODERS[name]))
        assert sum(p.numel() for p in model.parameters()) == count
    found = encoding_bytes(CLASSES.text_encoders, TEXT_ENCODERS, TOKENS, torch.bfloat16)
    assert 2 * sum(expected.values()) < found < 1.15 * 2 * sum(expected.values())


def test_those_of_a_folder_are_read_and_take_what_they_take(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    configs = encoder_configs(str(tmp_path))
    assert tuple(configs) == tuple(TEXT_ENCODERS)
    found = encoding_bytes(CLASSES.text_encoders, configs, dict.fromkeys(TEXT_ENCODERS, MAX_TOKENS), torch.float32)
    weights = sum(p.nbytes for name in TEXT_ENCODERS for p in getattr(pipe, name).parameters())
    assert found > weights
    twice = encoding_bytes(CLASSES.text_encoders, configs, dict.fromkeys(TEXT_ENCODERS, MAX_TOKENS // 2), torch.float32)
    assert weights < twice < found, "fewer tokens take less"
    assert found - weights > ENCODE_BATCH * MAX_TOKENS * 32 * 4, "a batch's embeddings, at least"
    assert encoding_bytes(CLASSES.text_encoders, {}, {}, torch.float32) == 0
