"""From noise to a reward's gradient: rollout, window, decoding, loss, drift."""
