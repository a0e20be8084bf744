"""What every generator shares: files, loading, flow, prompt embeddings, the Wan VAE's decoder."""
