"""The generator: transformer, pipeline, differentiable decoder and loader, without training."""
