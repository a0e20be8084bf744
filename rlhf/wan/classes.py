"""The classes of Wan's components, and its scheduler."""

from pathlib import Path

from transformers import T5TokenizerFast, UMT5EncoderModel

from rlhf.generator.loading import Classes
from rlhf.io import read_object
from rlhf.wan.pipeline import EulerFlowScheduler, WanPipeline
from rlhf.wan.transformer import WanTransformer3DModel


def load_scheduler(folder: Path) -> EulerFlowScheduler:
    """Return Euler steps with the shift of the checkpoint's scheduler, UniPC or Euler.

    Both solve one flow on sigmas with one shift. Raises ValueError for a scheduler of another flow.
    """
    config = read_object(folder / "scheduler_config.json")
    shift = config.get("flow_shift", config.get("shift"))
    is_flow = config.get("prediction_type", "flow_prediction") == "flow_prediction"
    if not isinstance(shift, int | float) or not shift > 0 or not is_flow or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"{folder}: got the scheduler {config.get('_class_name')} with shift {shift!r}, expected one of a flow "
            "with flow_shift or shift above 0, such as UniPCMultistepScheduler; correct scheduler_config.json"
        )
    return EulerFlowScheduler(shift=float(shift))


CLASSES = Classes(
    pipeline=WanPipeline,
    transformer=WanTransformer3DModel,
    text_encoders={"text_encoder": UMT5EncoderModel},
    tokenizers={"tokenizer": T5TokenizerFast},
    load_scheduler=load_scheduler,
)
