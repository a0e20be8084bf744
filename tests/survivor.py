"""One process of a run that is to be killed: run by test_survival, with accelerate's variables set for several."""

import sys
import time

from conftest import PROMPTS, redness
from tiny import tiny_pipeline

import rlhf.checkpoint
from rlhf.checkpoint import TrainingInterrupted
from rlhf.parse import parse_config
from rlhf.train import EXIT_INTERRUPTED
from rlhf.trainer import RewardGradientTrainer

if __name__ == "__main__":
    flush = rlhf.checkpoint._flush
    rlhf.checkpoint._flush = lambda path: (time.sleep(0.05), flush(path))  # time to be killed in
    try:
        RewardGradientTrainer(tiny_pipeline(), redness, parse_config(["--config", sys.argv[1]]), PROMPTS).train()
    except TrainingInterrupted:
        sys.exit(EXIT_INTERRUPTED)
