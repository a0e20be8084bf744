"""How transformer blocks run: kernel, recomputation, offloading, quantization, sharding."""
