"""A student as an ONNX graph, checked against the model that it was made of."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("stillhouse")

ONNX_FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TOLERANCE = 1e-3


def export_onnx(model: PreTrainedModel, folder: Path) -> Path:
    """Write model.onnx to ``folder``, for any number of sequences and tokens; run it and compare.

    Its inputs are int64 [B, T]: input_ids, attention_mask and, for models that take pairs, token_type_ids. Its outputs
    are the model's logits (start_logits and end_logits of a question answering model).
    Raises ConfigError when what it needs is not installed, or when the graph gives other logits.
    """
    _check_packages("onnx", "onnxscript", "onnxruntime")
    graph = _Logits(model.float().cpu().eval())
    names = [name for name in INPUTS if name != "token_type_ids" or getattr(model.config, "type_vocab_size", 1) > 1]
    shape = (3, 17)  # neither a batch of one nor a round number: what is fixed by mistake shows in the comparison
    example = _example(model.config.vocab_size, names, shape)
    sizes = {0: torch.export.Dim("sequences", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=1 << 16)}
    path, written = folder / ONNX_FILE, folder / f".{ONNX_FILE}.partial"
    path.unlink(missing_ok=True)
    torch.onnx.export(
        graph,
        tuple(example.values()),
        str(written),
        input_names=names,
        output_names=graph.output_names,
        dynamic_shapes={"inputs": tuple(sizes for _ in names)},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    tried = [_example(model.config.vocab_size, names, each) for each in (shape, (1, 9))]
    difference = max(_difference(graph, written, each) for each in tried)
    if not difference <= TOLERANCE:
        written.unlink()
        raise ConfigError(f"{path}: the graph gives other logits than the model, by {difference:.3g}")
    written.rename(path)
    log.info("exported to %s; its logits differ by %.1g from the model's", path, difference)
    return path


def open_session(path: Path) -> Any:
    """An onnxruntime session on the CPU. Raises ConfigError when there is no graph, or nothing to run it."""
    _check_packages("onnxruntime")
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such graph; make it with launch/export_hf.py --run RUN --onnx")
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _check_packages(*names: str) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--onnx needs the package {name}: pip install -c constraints.txt -e '.[onnx]'")


class _Logits(nn.Module):
    """The model with plain inputs and outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        is_question = type(model).__name__.endswith("ForQuestionAnswering")
        self.output_names = ["start_logits", "end_logits"] if is_question else ["logits"]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output: Any = self.model(**dict(zip(INPUTS, inputs)))
        return tuple(output[name] for name in self.output_names)


def _example(vocab_size: int, names: list[str], shape: tuple[int, int]) -> dict[str, Tensor]:
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % max(1, vocab_size - 1) + 1
    mask = torch.ones(shape, dtype=torch.long)
    mask[-1, shape[1] // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)} if len(names) == 3 else {
        "input_ids": ids, "attention_mask": mask}  # fmt: skip


@torch.no_grad()
def _difference(graph: _Logits, path: Path, example: dict[str, Tensor]) -> float:
    theirs = open_session(path).run(None, {name: tensor.numpy() for name, tensor in example.items()})
    real = example["attention_mask"].bool()
    worst = 0.0
    for ours, other in zip(graph(*example.values()), theirs):
        gap = (ours - torch.from_numpy(other)).abs()
        worst = max(worst, float((gap[real] if gap.dim() > 1 and gap.shape[:2] == real.shape else gap).max()))
    return worst
