"""One of two processes that train together: run by test_trainer, with accelerate's variables set."""

import sys

from conftest import PROMPTS, redness
from tiny import tiny_pipeline

from rlhf.config import RewardGradientConfig
from rlhf.parse import parse_config
from rlhf.trainer import RewardGradientTrainer

if __name__ == "__main__":
    args: RewardGradientConfig = parse_config(["--config", sys.argv[1]])
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS, PROMPTS[:3])
    trainer.train()
    trainer.accelerator.end_training()  # a process that ends while gloo's threads run may abort
