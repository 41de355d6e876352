"""Labels for a file of examples, by an exported model: labels of words, of texts and pairs, or answers to questions.

    python data_tools/predict.py --model runs/NAME/export --input test.tsv --output predicted.tsv [--onnx]

token_classification writes ``words<TAB>tags`` a line, sequence_classification JSON lines with label and probability,
question_answering the JSON {id: answer} that SQuAD's own evaluation reads. --onnx runs the model.onnx beside the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.example_encoding import Encoded, EncodingSpec, ExampleEncoder
from data_tools.examples import Classified, Columns, Example, Question, Tagged, read_examples
from data_tools.readers import find_inputs
from engine.data.annotation import UNKNOWN
from engine.data.atomic import write_atomically
from engine.errors import ConfigError, DataError
from engine.log import Progress, run_main
from engine.models import MODEL_CLASSES, load_hf_config, shell
from engine.tasks.packing_trial import num_positions
from engine.tasks.squad import Candidate, best_answer, choose_answers

_SEQUENCE_TOKENS = 384
_SEQUENCES = 32
"""Of a forward pass at most: a long context has many windows."""

Forward = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
"""[B, T] int64 inputs to the model's outputs"""


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    config = load_hf_config(options.model, "--model", revision=None, remote_code=False)
    task = _task_of(config, options.model)
    takes_pairs = getattr(config, "type_vocab_size", 1) > 1
    forward = _onnx(options.model) if options.onnx else _torch(options.model, task)
    tokens = _sequence_tokens(options.sequence_tokens, num_positions(shell(config, MODEL_CLASSES[task])))
    spec = EncodingSpec(task, options.model, tokens, (), options.overlap_tokens, options.question_tokens)
    predictor = Predictor(
        task,
        {int(i): str(name) for i, name in (config.id2label or {}).items()},
        forward,
        takes_pairs,
        config.pad_token_id or 0,
        options.always_answer,
    )
    columns = Columns(options.text_column, options.second_column, "", options.columns)
    paths = find_inputs([options.input], any_ending=True)
    examples = chain.from_iterable(read_examples(task, path, columns, unlabelled=True) for path in paths)
    encoder = ExampleEncoder(spec)
    with Progress(total=None, label="examples") as progress:
        while batch := list(islice(examples, options.batch_examples)):
            predictor.add(batch, encoder(batch))
            progress.update(predictor.num_examples)
    if predictor.num_examples == 0:
        raise DataError(f"--input {options.input}: no example in it")
    write_atomically(options.output, predictor.text().encode())
    print(f"{options.output}: {predictor.num_examples:,} examples")
    return 0


class Predictor:
    """Collects what the model says of examples, and writes it."""

    def __init__(
        self,
        task: str,
        labels: dict[int, str],
        forward: Forward,
        takes_pairs: bool,
        pad_id: int,
        always_answer: bool = False,
    ) -> None:
        self.num_examples = 0
        self._always_answer = always_answer
        self._task, self._labels, self._forward = task, labels, forward
        self._takes_pairs, self._pad_id = takes_pairs, pad_id
        self._lines: list[str] = []
        self._candidates: list[Candidate] = []

    def add(self, examples: Sequence[Example], samples: Sequence[Sequence[Encoded]]) -> None:
        every = [sample for each in samples for sample in each]
        runs = (every[start : start + _SEQUENCES] for start in range(0, len(every), _SEQUENCES))
        outputs = chain.from_iterable(map(self._run, runs))
        for example, own in zip(examples, samples):
            found = list(islice(outputs, len(own)))
            self._note(example, own, found)
            self.num_examples += 1

    def _run(self, samples: Sequence[Encoded]) -> Iterator[list[np.ndarray]]:
        """The outputs for each sample."""
        lengths = [len(sample.token_ids) for sample in samples]
        shape = (len(samples), max(lengths))
        ids, mask, types = np.full(shape, self._pad_id, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, sample in enumerate(samples):
            ids[row, : lengths[row]], mask[row, : lengths[row]] = sample.token_ids, 1
            types[row, sample.annotation.piece_tokens[0] : lengths[row]] = 1
        inputs = {"input_ids": ids, "attention_mask": mask} | ({"token_type_ids": types} if self._takes_pairs else {})
        outputs = self._forward(inputs)
        return iter([[output[row] for output in outputs] for row in range(len(samples))])

    def _note(self, example: Example, samples: Sequence[Encoded], outputs: Sequence[list[np.ndarray]]) -> None:
        if isinstance(example, Tagged):
            tags = [
                self._labels[int(logits[place].argmax())]
                for sample, (logits,) in zip(samples, outputs)
                for place in np.flatnonzero(sample.annotation.labels == UNKNOWN)
            ]
            self._lines.append(" ".join(example.words) + "\t" + " ".join(tags))
        elif isinstance(example, Classified):
            ((logits,),) = outputs
            p = np.exp(logits - logits.max())
            best = int(logits.argmax())
            answer: dict[str, Any] = {"label": self._labels[best], "probability": round(float(p[best] / p.sum()), 6)}
            self._lines.append(json.dumps(answer, ensure_ascii=False))
        else:
            assert isinstance(example, Question)
            for sample, (starts, ends) in zip(samples, outputs):
                length = len(sample.token_ids)
                self._candidates.append(best_answer(sample.annotation.example, starts[:length], ends[:length]))

    def text(self) -> str:
        if self._task == "question_answering":
            return (
                json.dumps(
                    choose_answers(self._candidates, may_be_none=not self._always_answer), ensure_ascii=False, indent=1
                )
                + "\n"
            )
        return "".join(f"{line}\n" for line in self._lines)


def _sequence_tokens(asked: int | None, limit: int | None) -> int:
    if asked is not None and limit is not None and asked > limit:
        raise ConfigError(f"--sequence-tokens {asked}: the model has {limit} positions")
    return asked or min(_SEQUENCE_TOKENS, limit or _SEQUENCE_TOKENS)


def _task_of(config: Any, where: str) -> str:
    kinds = {"TokenClassification": "token_classification", "SequenceClassification": "sequence_classification",
             "QuestionAnswering": "question_answering"}  # fmt: skip
    architecture = (config.architectures or ["none"])[0]
    task = next((task for name, task in kinds.items() if architecture.endswith(f"For{name}")), None)
    if task is None:
        raise ConfigError(f"--model {where}: its architecture is {architecture}; expected one For{', For'.join(kinds)}")
    return task


def _torch(folder: str, task: str) -> Forward:
    from engine.config.run import ModelSection
    from engine.models import load_model, move

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = move(load_model(ModelSection(model=folder), MODEL_CLASSES[task], torch.float32, "--model"), device)
    names = ("start_logits", "end_logits") if task == "question_answering" else ("logits",)

    @torch.inference_mode()
    def forward(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        output = model(**{name: torch.from_numpy(array).to(device) for name, array in inputs.items()})
        return [output[name].float().cpu().numpy() for name in names]

    return forward


def _onnx(folder: str) -> Forward:
    from engine.onnx_export import ONNX_FILE, open_session

    session = open_session(Path(folder) / ONNX_FILE)
    return lambda inputs: session.run(None, inputs)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that a run exported, or a hub id")
    parser.add_argument(
        "--input", required=True, help="file of examples, as for build_shards.py; labels in it are not used"
    )
    parser.add_argument("--output", required=True, type=Path, help="file to write")
    parser.add_argument("--onnx", action="store_true", help="run MODEL/model.onnx with onnxruntime")
    parser.add_argument("--batch-examples", type=int, default=32, help="examples at once (default: 32)")
    parser.add_argument(
        "--sequence-tokens", type=int, help="tokens of a sequence at most (default: 384, or the model's positions)"
    )
    parser.add_argument("--overlap-tokens", type=int, default=128, help="that windows of a long context share")
    parser.add_argument("--question-tokens", type=int, default=64, help="of a question at most")
    parser.add_argument("--always-answer", action="store_true", help="every question has an answer, as in SQuAD 1.1")
    parser.add_argument("--text-column", default="text", help="column of the text in tables and JSON")
    parser.add_argument("--second-column", help="column of the second text of a pair")
    parser.add_argument(
        "--columns", type=lambda text: tuple(text.split(",")), help="columns of a table without a header"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
