"""The run YAML as strict, frozen pydantic sections. Parsing imports no torch and reads nothing but the file.

The string under a field is its documentation: docs/config.md is generated from it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine.config.cache import CacheSection
from engine.config.cluster import ClusterSection
from engine.config.following import CheckpointSection, EarlyStopSection, EvaluationSection, TrackingSection
from engine.config.section import Beta, Count, Fraction, NonNegative, Section
from engine.config.terms import AnyTerm


class RunSection(Section):
    """What the run is called, where it lives and how long it is."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run's folder below `output`."""
    output: str = "runs"
    """Folder that holds the runs."""
    stage_of: str | None = None
    """Written by a run in stages into each stage's config: the name of the whole."""
    seed: int = 0
    """Seed of the data order, of fresh weights and of dropout."""
    num_steps: Count | None = None
    """Optimizer steps. Give this or `num_epochs`."""
    num_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data, turned into steps. Give this or `num_steps`."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the student's training. `auto` takes what the DeepSpeed JSON names, else the accelerator's best
    (bf16, then fp16, on a GPU; fp32 on a CPU)."""
    gradient_checkpointing: bool = False
    """Recompute the student's layers in the backward pass: less memory, about a third more student time."""

    @model_validator(mode="after")
    def _one_length(self) -> RunSection:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError("give exactly one of run.num_steps and run.num_epochs")
        return self


class TaskSection(Section):
    """What is learned, and for masked language models how tokens are masked."""

    kind: Literal["masked_lm", "causal_lm", "token_classification", "sequence_classification", "question_answering"]
    """`masked_lm` for encoders with an MLM head, `causal_lm` for decoders; `token_classification` labels each word,
    `sequence_classification` a text or a pair of texts, `question_answering` finds the answer in a context."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id. Default: the teacher's, else the student's."""
    mask_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of a sequence's tokens to predict (at least one)."""
    mask_replace: Fraction = 0.8
    """Of those, the share shown as the mask token."""
    mask_random: Fraction = 0.1
    """Of those, the share shown as a random token. The rest is shown unchanged."""
    mask_smoothing: NonNegative = 0.0
    """Choose a token with weight count^-this: rare tokens more often. XLM and DistilBERT use 0.7; 0 is uniform."""
    mask_rounds: Count = 16
    """Different masks a sample gets, one an epoch, before they repeat."""
    mask_seed: int = 0
    """Seed of the masks; apart from `run.seed`, so that a cache of targets outlives a change of seed."""

    @model_validator(mode="after")
    def _mask_shares(self) -> TaskSection:
        if self.mask_replace + self.mask_random > 1.0:
            raise ValueError("task.mask_replace + task.mask_random is more than 1")
        return self


class ModelSection(Section):
    """Settings that the student and the teacher share."""

    model: str | None = None
    """Folder or hub id of the weights."""
    revision: str | None = None
    """Hub revision of `model`."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention implementation; `auto` leaves it to transformers."""
    allow_pickle: bool = False
    """Load weights from a pickle (.bin, .pt) when there is no safetensors file. A pickle can run any code."""
    trust_remote_code: bool = False
    """Let the model's repository run its own code."""


class StudentSection(ModelSection):
    """Where the student comes from: exactly one of `model`, `config` and `init: teacher_layers`; `init: svd_embeddings`
    goes with one of the first two."""

    config: str | dict[str, Any] | None = None
    """A transformers config (folder, hub id, .json file, or a mapping with `model_type`): fresh weights."""
    init: Literal["teacher_layers", "svd_embeddings"] | None = None
    """`teacher_layers`: copy the teacher's embeddings, head and the layers named in `layers`. `svd_embeddings`: fill
    the word embeddings of a narrower student with the teacher's, cut to its width by their singular values."""
    layers: Count | tuple[int, ...] | None = None
    """Teacher layers to copy: a list of indices, or a count spread evenly from the first to the last."""
    architecture: Literal["distilbert"] | None = None
    """With `init: teacher_layers`, the architecture that the layers are put into: `distilbert` makes a DistilBERT of a
    BERT. Default: the teacher's own."""
    sinusoidal_positions: bool = False
    """With `architecture: distilbert`: fixed sine waves in the place of the teacher's position embeddings."""

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        copies = self.init == "teacher_layers"
        origins = [name for name in ("model", "config") if getattr(self, name) is not None]
        origins += ["init: teacher_layers"] if copies else []
        if len(origins) != 1:
            raise ValueError(
                "give exactly one of student.model, student.config and student.init: teacher_layers, found "
                f"{origins or 'none'}"
            )
        if copies != (self.layers is not None):
            raise ValueError("student.layers goes with student.init: teacher_layers")
        if self.architecture is not None and not copies:
            raise ValueError("student.architecture goes with student.init: teacher_layers")
        if self.sinusoidal_positions and self.architecture is None:
            raise ValueError("student.sinusoidal_positions goes with student.architecture: distilbert")
        return self


class TeacherSection(ModelSection):
    """Who gives the targets."""

    kind: Literal["none", "online", "cached"] = "none"
    """`none` trains on labels alone, `online` asks a model in inference mode, `cached` reads what
    `launch/cache_teacher.py` kept of its answers."""
    cache: str | None = None
    """The cache: a folder or address (with a slash), or the name of one beside the data's manifest."""
    on_missing: Literal["refuse", "ask"] = "refuse"
    """What `cached` does with shards that the cache lacks: name them and stop, or ask `model` and write them back."""
    tail: Literal["bucket", "renormalise", "residual_to_label"] = "bucket"
    """What becomes of the mass that `top_k` and `top_p` do not keep: one more outcome, nothing (the kept ids are
    scaled up), or the label's."""
    placement: Literal["replicated", "zero3", "tensor_parallel"] = "replicated"
    """Where an online teacher's weights lie: whole on every device; cut over all ranks and gathered layer by layer; or
    each layer computed by `tp_size` ranks together. Its vocabulary head is whole on every device."""
    tp_size: Annotated[int, Field(ge=2)] | None = None
    """Ranks that compute a teacher's layer together under `tensor_parallel`: neighbours, best on one host."""
    offload: Literal["none", "cpu"] = "none"
    """`cpu`: the weights stay in host memory, each layer is brought to the device when it is its turn. With `zero3`
    each rank holds its share of them, with `replicated` all of them."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the teacher. `auto` is the student's."""
    quantize: Literal["none", "int8"] = "none"
    """`int8`: the weights of its linear layers in 8 bits, each row with a scale of its own; needs torchao."""
    even_pairs: tuple[tuple[str | int, str | int], ...] = ()
    """Pairs of tokens, as text or ids, whose probabilities by an online teacher are evened out before they are learned:
    [[he, she], [his, her]]. The constraint of FairDistillation."""
    overlap: bool = False
    """On a GPU, ask a `replicated` teacher about the next micro-batch of a step while the student works on this one, on
    a stream of its own. Costs one more micro-batch of teacher states. On a CPU it changes nothing."""

    @model_validator(mode="after")
    def _model_named(self) -> TeacherSection:
        if self.kind == "online" and self.model is None:
            raise ValueError("teacher.kind: online needs teacher.model")
        if self.kind == "cached" and self.cache is None:
            raise ValueError("teacher.kind: cached needs teacher.cache, a folder or a name beside the data's manifest")
        if self.on_missing == "ask" and (self.kind != "cached" or self.model is None):
            raise ValueError("teacher.on_missing: ask needs teacher.kind: cached and teacher.model")
        if self.kind == "none" and self.model is not None:
            raise ValueError("teacher.model is given but teacher.kind is none; say kind: online")
        if (self.placement == "tensor_parallel") != (self.tp_size is not None):
            raise ValueError("teacher.tp_size goes with teacher.placement: tensor_parallel")
        return self


class DataSection(Section):
    """Which shards, in which order, and how they are read."""

    manifest: str
    """manifest.json of the training shards: a path, or an http(s):// or s3:// address."""
    lanes: Count = 64
    """Fixed slices of the data order. The number of ranks must divide it; more lanes allow more ranks later."""
    shuffle_samples: Count = 1024
    """Samples shuffled together inside a lane."""
    sort_samples: Annotated[int, Field(ge=0)] = 0
    """Samples of a lane that are sorted by length together, so that the sequences of a step are of about one length
    and little is padded: for data that is not packed. 0 does not sort."""
    epoch_samples: Count | None = None
    """Samples of an epoch; the next one takes others. Default: all."""
    reader_threads: Count = 1
    """Threads that read and collate ahead of training. One is fastest where reading does not wait; more hide the
    latency of http(s)://, s3:// and slow shared disks."""
    prefetch_steps: Count = 2
    """Steps kept ready."""
    retry_seconds: NonNegative = 300.0
    """How long a shard server that fails (5xx, 429, closed or broken connections, names that do not resolve) is asked
    again before the run stops, from its first failure on, whatever it is asked for. The time begins anew when it
    answers."""
    server_timeout_seconds: Annotated[float, Field(gt=0)] = 30.0
    """A request of a server that sends nothing for so long has failed. One that sends slowly has not."""
    max_bad_samples: Annotated[int, Field(ge=0)] = 0
    """Damaged records to skip, over the whole run and all ranks, before the run stops."""
    allow_pipe: bool = False
    """Allow `pipe:` shard addresses, which run shell commands. A manifest can never turn this on."""


class BatchSection(Section):
    """How many sequences make a step. Gradient accumulation follows from these two and the number of ranks."""

    global_sequences: Count
    """Sequences of one optimizer step, over all ranks."""
    micro_sequences: Count
    """Sequences of one forward pass on one device."""


class OptimizerSection(Section):
    """AdamW. Norms and biases are not decayed."""

    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate."""
    projection_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the projections that terms train beside the student: they begin with random weights.
    Default: the student's."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    """Decay of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled decay of matrices and embeddings."""
    max_grad_norm: NonNegative = 1.0
    """Clip the global gradient norm; 0 does not clip."""


class ScheduleSection(Section):
    """The learning rate over the steps."""

    kind: Literal["linear", "cosine", "constant", "wsd", "multi_step", "plateau"] = "cosine"
    """Shape after the warm-up. `wsd`: constant, then linear decay at the end."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    final_fraction: Fraction = 0.0
    """Where linear, cosine and wsd end, as a share of the peak; the floor of plateau."""
    decay_steps: Count | None = None
    """wsd: steps of the final decay. Default: a tenth of the run."""
    milestones: tuple[Count, ...] = ()
    """multi_step: steps at which the rate is multiplied by `factor`."""
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """multi_step and plateau: the multiplier."""
    patience: Count = 3
    """plateau: evaluations without a better held-out loss before the rate falls."""


class RunConfig(Section):
    """A whole run."""

    run: RunSection
    task: TaskSection
    student: StudentSection
    teacher: TeacherSection = TeacherSection()
    cache: CacheSection = CacheSection()
    data: DataSection
    batch: BatchSection
    losses: Annotated[tuple[AnyTerm, ...], Field(min_length=1)]
    """The terms of the objective."""
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    freeze: tuple[str, ...] = ()
    """Parts of the student that are not trained: `embeddings` or one kind of them (`word_embeddings`,
    `position_embeddings`, `token_type_embeddings`), `layers`, `layers 3` or `layers 0-5`, `encoder` (embeddings and
    layers), `head`."""
    early_stop: EarlyStopSection | None = None
    """When to stop before the last step. None: never."""
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    cluster: ClusterSection = ClusterSection()
    zero: str | dict[str, Any] = Field(default={"zero_optimization": {"stage": 2}})
    """The DeepSpeed JSON: a path, or its content. Numbers that the run owns are "auto" there."""
