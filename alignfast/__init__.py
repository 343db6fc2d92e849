"""Fast, exact trainers and kernels for aligning language models."""

__version__ = "0.1.0"
