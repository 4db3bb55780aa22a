"""Benchmarks: ``python -m benchmarks --help``."""

import os

# Before transformers is imported: the model lies in an installed package, and progress is printed line by line.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
