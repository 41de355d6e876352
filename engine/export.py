"""A checkpoint as a Hugging Face folder, checked by reading it back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from engine.errors import CheckpointError
from engine.models import DTYPES, MODEL_CLASSES, cast

log = logging.getLogger("stillhouse")

PREFIX = "model."
"""Where the student lies in the module that is trained; projections of the objective are left behind."""
PIPELINES = {
    "masked_lm": "fill-mask",
    "causal_lm": "text-generation",
    "token_classification": "token-classification",
    "sequence_classification": "text-classification",
    "question_answering": "question-answering",
}
AUTO_CLASSES: dict[str, Any] = {task: getattr(transformers, name) for task, name in MODEL_CLASSES.items()}


def student_from_state(state: dict[str, Tensor], config_folder: Path, task: str) -> PreTrainedModel:
    """The student in fp32, in evaluation mode. Raises CheckpointError when the weights are not those of its config."""
    config = AutoConfig.from_pretrained(config_folder)
    model: PreTrainedModel = AUTO_CLASSES[task].from_config(config, dtype=torch.float32)
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name in dict(model.named_parameters())]  # buffers are made anew
    if missing or unexpected:
        raise CheckpointError(
            f"the checkpoint's weights are not those of {config_folder}: {len(missing)} missing {missing[:3]}, "
            f"{len(unexpected)} unknown {list(unexpected)[:3]}"
        )
    model.tie_weights()
    return model.eval()


def export_student(
    model: PreTrainedModel,
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
    dtype: str = "fp32",
) -> Path:
    """Write config, safetensors, tokenizer and model card to ``folder``, then read it back and compare logits.

    Raises CheckpointError when what was read back gives other logits.
    """
    model = cast(model, DTYPES[dtype]).cpu()
    (folder / "model.onnx").unlink(missing_ok=True)  # of other weights
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    readme = folder / "README.md"
    readme.write_text(card)
    for path in folder.glob("*.safetensors"):  # made for its owner alone; the rest has the modes of the umask
        path.chmod(readme.stat().st_mode)
    again = AUTO_CLASSES[task].from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    ids = torch.arange(8).unsqueeze(0) % model.config.vocab_size
    with torch.no_grad():
        pairs = zip(_logits(model(input_ids=ids)), _logits(again(input_ids=ids)))
        difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    if not difference <= 1e-5:
        raise CheckpointError(
            f"{folder}: read back, the exported model gives other logits (difference {difference:.3g})"
        )
    log.info("exported to %s; read back, its logits are the same (difference %.1g)", folder, difference)
    return folder


def _logits(output: Any) -> list[Tensor]:
    """Of any task's model: question answering has two."""
    return [output[name].float() for name in ("logits", "start_logits", "end_logits") if name in output]


def model_card(name: str, task: str, teacher: str | None, loss_lines: list[str], figures: dict[str, str]) -> str:
    """A short README for the exported folder."""
    pipeline = PIPELINES[task]
    origin = f"It was distilled from `{teacher}`." if teacher else "It was trained on labels alone."
    rows = "\n".join(f"| {key} | {value} |" for key, value in figures.items())
    terms = "\n".join(f"- {line}" for line in loss_lines)
    return (
        f"---\npipeline_tag: {pipeline}\ntags: [distillation, stillhouse]\n---\n\n"
        f"# {name}\n\nMade with Stillhouse. {origin}\n\n"
        f"Objective:\n\n{terms}\n\n| figure | value |\n|---|---|\n{rows}\n\n"
        f'```python\nfrom transformers import pipeline\n\npipe = pipeline({pipeline!r}, model=".")\n```\n'
    )
