"""The LoRA adapter: fp32 master weights, merging, scaling, optimizer."""
