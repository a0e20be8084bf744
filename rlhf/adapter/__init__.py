"""The trained part of the transformer: LoRA, fp32 master weights, optimizer."""
