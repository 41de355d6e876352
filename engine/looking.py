"""Models looked at beside each other, of a run or of folders: near words, pseudo-perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.checkpoint import best
from engine.config.run import ModelSection, TaskSection
from engine.data.shards import ShardSet
from engine.errors import ConfigError
from engine.finish import load_student
from engine.models import MODEL_CLASSES, load_model, move
from engine.nearest import nearest_table
from engine.pseudo import pseudo_perplexity
from engine.runfolder import read_config
from engine.staging import newest_stage
from engine.tasks.task import build_task
from engine.tasks.tokenizer import compare_tokenizers, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Look:
    """A student, and a teacher where one is named, with their tokenizer.

    Raises ConfigError where there is nothing to look at, or where the two have other tokenizers.
    """

    def __init__(self, task: str, models: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> None:
        self.task, self.models, self.tokenizer = task, models, tokenizer
        self.heldout: str | None = None
        """the manifest that the run was scored on"""

    @staticmethod
    def at_run(folder: Path, checkpoint: Path | None, teacher: str | None) -> Look:
        """The best or newest student of a run, and its teacher."""
        folder = newest_stage(folder)
        config = read_config(folder)
        student = load_student(folder, checkpoint or best(folder / "checkpoints"), config.task.kind)
        shown = teacher or config.teacher.model or config.evaluation.teacher
        named = {"teacher": shown, "student": str(folder / "student")}
        loaded = {"student": student}
        if teacher is None and config.teacher.model is not None:  # by the run's revision and permissions
            loaded["teacher"] = load_model(config.teacher, MODEL_CLASSES[config.task.kind], torch.float32, "teacher")
        look = Look.at_models(named, config.task.kind, loaded)
        look.heldout = config.evaluation.test_manifest or config.evaluation.manifest
        return look

    @staticmethod
    def at_models(
        named: dict[str, str | None], task: str | None = None, loaded: dict[str, PreTrainedModel] | None = None
    ) -> Look:
        """Models by the folder or hub id of each, but for those that are ``loaded`` already. Without a ``task`` they
        are taken for language models, masked ones where the tokenizer has a mask token."""
        where = {role: name for role, name in named.items() if name is not None}
        tokenizers = {role: load_tokenizer(name) for role, name in where.items()}
        (first, tokenizer), *others = tokenizers.items()
        for role, other in others:
            compare_tokenizers(tokenizer, other, (first, role))
        task = task or ("causal_lm" if tokenizer.mask_token_id is None else "masked_lm")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        models = {}
        for role, name in where.items():
            model = (loaded or {}).get(role)
            if model is None:
                model = load_model(ModelSection(model=name), MODEL_CLASSES[task], torch.float32, role)
            models[role] = move(model.eval(), device)
        return Look(task, models, tokenizer)

    def nearest(self, words: Sequence[str]) -> list[str]:
        """A table of near words."""
        return nearest_table(self.models, self.tokenizer, words)

    def pseudo_perplexity(self, manifest: str | None, max_sequences: int) -> list[str]:
        """A line a model. Raises ConfigError for models that do not fill masks, or without held-out text."""
        address = manifest or self.heldout
        if self.task != "masked_lm" or address is None:
            raise ConfigError(
                "--pseudo-perplexity masks one token after another of held-out text: it needs a masked_lm and "
                f"--manifest HELDOUT/manifest.json, found {self.task} and {address}"
            )
        shards = ShardSet.open(address)
        task = build_task(TaskSection(kind="masked_lm"), self.tokenizer, shards.manifest, shards.token_counts())
        lines = []
        for role, model in self.models.items():
            value, num_tokens = pseudo_perplexity(model, task, self.tokenizer, shards, max_sequences)
            lines.append(f"{role:<8} pseudo-perplexity {value:,.2f} over {num_tokens:,} tokens")
        return lines
