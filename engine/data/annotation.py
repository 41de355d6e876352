"""What the samples of labelled tasks hold beside their tokens, and how it must be.

``labels`` is [T] for token_classification, [1] for sequence_classification and [2] for question_answering, where the
two are the places of the answer's first and last token. NONE stands where a token takes no part, UNKNOWN where the
label is not known, and FIRST + i for class or place i.
"""

from __future__ import annotations

import numpy as np

from engine.data.manifest import Manifest
from engine.data.record import DamagedRecord
from engine.schema import Annotation

NONE, UNKNOWN, FIRST = 0, 1, 2
MAX_PIECES = 2


def encode_labels(labels: list[int | None]) -> np.ndarray:
    """Indices of classes or places as they are stored; None is a label that is not known."""
    return np.array([UNKNOWN if label is None else FIRST + label for label in labels], dtype=np.uint32)


def check_annotation(annotation: Annotation, num_tokens: int, manifest: Manifest, key: str) -> None:
    """Raises DamagedRecord where labels or pieces cannot be those of a sample of ``num_tokens``."""
    labels, pieces = annotation.labels, annotation.piece_tokens.tolist()
    if sum(pieces) != num_tokens or 0 in pieces or len(pieces) > MAX_PIECES:
        raise DamagedRecord(f"pieces of {pieces} tokens do not add up to its {num_tokens} tokens", key)
    wanted = {"token_classification": num_tokens, "sequence_classification": 1, "question_answering": 2}
    if len(labels) != wanted[manifest.task]:
        raise DamagedRecord(f"{len(labels)} labels, expected {wanted[manifest.task]}", key)
    num_labels = num_tokens if manifest.task == "question_answering" else len(manifest.labels)
    if int(labels.max(initial=0)) >= FIRST + num_labels:
        raise DamagedRecord(f"label number {int(labels.max()) - FIRST}, expected below {num_labels}", key)
