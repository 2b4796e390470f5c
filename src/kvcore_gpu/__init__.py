"""The CUDA backend of kvcore, which a later version brings."""
