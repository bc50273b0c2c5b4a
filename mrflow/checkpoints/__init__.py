"""Checkpoints as files: the strict safetensors reader and the names that wrappers add."""
