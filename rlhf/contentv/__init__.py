"""The generator: ContentV's transformer, pipeline, differentiable decoder and loader, without training."""
