"""The classes of ContentV's components."""

from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from rlhf.contentv.pipeline import ContentVPipeline
from rlhf.contentv.transformer import SD3Transformer3DModel
from rlhf.generator.loading import Classes, load_config

CLASSES = Classes(
    pipeline=ContentVPipeline,
    transformer=SD3Transformer3DModel,
    text_encoders={
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    },
    tokenizers={"tokenizer": CLIPTokenizer, "tokenizer_2": CLIPTokenizer, "tokenizer_3": T5TokenizerFast},
    load_scheduler=lambda folder: load_config(FlowMatchEulerDiscreteScheduler, folder),
)
