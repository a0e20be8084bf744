"""The generator: ContentV's transformer, pipeline, differentiable decoder and loader. Nothing of training."""
