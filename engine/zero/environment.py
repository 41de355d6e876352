"""What DeepSpeed reads from the environment when it is imported. Comes before every other module of this package."""

from __future__ import annotations

import os
import sys

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
# torch's own switch: large tensors on a CPU in pages of 2 MiB, where a fault for each 4 KiB costs a tenth of a step
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# another ninja than the one that compiled an op cannot read its log, and compiles anew
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
# compiled ops belong to their environment: two that share a cache rebuild them in turns
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR",
    os.path.join(
        sys.prefix if os.access(sys.prefix, os.W_OK) else os.path.expanduser("~/.cache/stillhouse"), "torch_extensions"
    ),
)
