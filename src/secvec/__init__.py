"""Fine-tune language models on untrusted data without learning unwanted behaviours."""

__version__ = "0.1.0"
