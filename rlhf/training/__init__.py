"""Parts of the training loop: setup, batches, calibration, callbacks, monitor, failures."""
