"""Settings and sizes of the tiny pipeline, for the planner."""

from tiny import tiny_pipeline, tiny_transformer

from rlhf.config import RewardGradientConfig, with_sampling
from rlhf.generator.files import model_sizes

CHECKPOINTED = {"gradient_checkpointing": True}
DECODED = {"decode_chunk": 1, "decode_checkpoint": True}


def tiny(num_layers: int = 4, **settings):
    pipe = tiny_pipeline()
    pipe.register_modules(transformer=tiny_transformer(num_layers=num_layers))  # the first has text without gradient
    common = {"lora_rank": 4, "num_frames": 33, "per_device_train_batch_size": 2, "num_grad_steps": 2}
    card = model_sizes("", pipe)
    return pipe, with_sampling(RewardGradientConfig(**common | settings), card["sampling"]), card
