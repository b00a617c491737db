"""The section ``fwdllm`` and the sections in it: what FederatedScope has no word for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fs_fwdllm.config.base_section import BaseConfig
from fs_fwdllm.config.registries import ESTIMATORS, EXTENSIONS
from fs_fwdllm.config.robust_section import RobustConfig
from fs_fwdllm.config.section import Section, known_word
from fs_fwdllm.config.tls_section import TlsConfig
from fs_fwdllm.core.direction import DIRECTIONS
from fs_fwdllm.errors import nearest

__all__ = [
    "FROZEN",
    "POOLING_WORDS",
    "BlockDownloadConfig",
    "BlocksConfig",
    "FleetConfig",
    "FwdllmConfig",
    "FwdllmDataConfig",
    "GateConfig",
    "PartConfig",
    "ReportConfig",
    "SourceConfig",
]

#: A source of no slopes: what it is given for stays as it is.
FROZEN = "frozen"

#: Ways to make one vector of a text's tokens, in the order in which several are put side by side.
POOLING_WORDS = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "lasttoken")


class FwdllmDataConfig(Section):
    reader: Literal["own", "host"] = Field(
        "own",
        description="who reads, tokenises and divides instruction data inside FederatedScope: own is this package, as "
        "on every host; host is FederatedScope, for its numbers (other tokens and other clients than elsewhere)",
        json_schema_extra={"host_only": True},
    )
    text: str = Field("text", description="column or field of the text (FILE@text); several are joined by +")
    text_pair: str = Field("", description="column or field of a second text, where a sample is a pair (FILE@text)")
    label: str = Field("label", description="column or field of the label (FILE@text)")
    encoding: str = Field("", description="encoding of the data files by Python's name, e.g. cp1252; empty is UTF-8")
    columns: list[str] = Field([], description="column names of a CSV file without a header line")
    labels: list[Any] = Field([], description="the classes, in order; empty takes the sorted labels of the data")
    regression: bool = Field(False, description="labels are numbers (FILE@text with an encoder); as model.num_labels 1")
    drop_empty_labels: bool = Field(False, description="leave out rows without a label, instead of refusing them")
    merge_labels: bool = Field(False, description="one class where names differ only by case or white space")
    stratify: bool = Field(False, description="draw train, validation and test rows class by class, over all clients")
    natural: str = Field("", description="field that names a row's client, for data.splitter natural")
    category: str = Field("", description="field that data.splitter meta and lda group by; empty is the task's own")
    test_file: str = Field("", description="file in data.root whose rows are the test split, instead of a share")
    max_test_samples: int = Field(0, ge=0, description="evaluate on this many test samples (seeded draw); 0 is all")
    partition: str = Field("", description="FedNLP's NAME_partition.h5 in data.root: who holds which rows of FILE.h5")
    partition_method: str = Field("", description="name of a partition in that file, e.g. uniform_client_1000")
    allow_overlap: bool = Field(False, description="accept a partition that deals a row twice")
    held_out_clients: float = Field(0.0, ge=0, lt=1, description="share of the clients whose rows are the test split")
    centralised: bool = Field(False, description="one client holds what all would: the centralised reference")
    stride: int = Field(64, ge=0, description="tokens that neighbouring windows on a long context share (FILE@qa)")
    template: Literal["auto", "alpaca", "chat", "plain", "none"] = Field(
        "auto",
        description="how a conversation is written (@llm); auto is Alpaca's prompt for instructions, the texts as they "
        "are for prompt and completion, and the tokenizer's chat template, or plain without one, for messages",
    )
    unanswerable: bool = Field(
        False, description="questions may have no answer (FILE@qa); so it is anyway where one of the file has none"
    )
    prompt: str = Field("{text}\nLabel:", description="what a language model reads to classify (FILE@text)")
    label_words: list[str] = Field([], description="words of the classes, in order; empty takes their names")


class GateConfig(Section):
    kind: Literal["none", "published", "relative"] = Field(
        "none", description="variance gate of the server step; relative is scale-free, published is FwdLLM's"
    )
    threshold: float = Field(
        0.0, ge=0, description="largest statistic that is accepted; 0 is the kind's own: 0.1, or sqrt(parameters / 8)"
    )
    max_repeats: int = Field(10, ge=0, description="rounds beyond the first after which a step is taken anyway")
    tensor: str = Field("all", description="trainable tensor that the published gate looks at, or all")


class SamplingConfig(Section):
    kind: Literal["none", "published", "corrected"] = Field(
        "none", description="looking along the previous gradient estimate; published is biased, corrected is not"
    )
    candidates: int = Field(10, ge=2, description="directions drawn per probe that the published ranking keeps")
    every: int = Field(1, ge=1, description="sample discriminatively in every N-th server step only (FwdLLM: 2)")


class StepConfig(Section):
    control: Literal["none", "normalised", "trust_ratio"] = Field(
        "none", description="step length: as estimated, for a gradient of norm one, or lr times the parameters' norm"
    )
    report_norms: bool = Field(False, description="report how far every step moved the parameters")
    report_cosine: bool = Field(
        False, description="report the cosine of the estimate to the backprop gradient in rounds that evaluate"
    )


class SourceConfig(Section):
    slopes: str = Field(
        "", description="where slopes come from: as fwdllm.estimator, or frozen for none; empty is fwdllm.estimator"
    )
    probes: int = Field(0, ge=0, description="directions per step, each measured by forward passes; 0: fwdllm.probes")
    scalars: int = Field(
        0, ge=0, description="the same where a slope costs no pass (closed_form, projected); 0 is fwdllm.probes"
    )

    @field_validator("slopes")
    @classmethod
    def _source_is_known(cls, value: str) -> str:
        return value if value == "" else known_word([*ESTIMATORS, FROZEN], value)


class PartConfig(SourceConfig):
    match: str = Field(
        "*",
        min_length=1,
        description="trainables of the part: words of their dotted names, or a pattern with * and ?; the first part "
        "that matches has a tensor",
    )
    rate: float = Field(1.0, ge=0, description="what train.optimizer.lr is multiplied with")


class FleetConfig(SourceConfig):
    clients: int | list[int] = Field(description="how many clients (the next by number), or their numbers")
    parts: list[PartConfig] = Field(
        [], description="sources part by part, in the order of fwdllm.parts; empty has one for all that are not frozen"
    )


class BlockDownloadConfig(Section):
    select: Literal["all", "changed"] = Field(
        "changed", description="blocks a client is sent: all, or those that changed since it last received them"
    )
    inactive: Literal["exact", "int8", "int4"] = Field(
        "exact", description="how blocks that are not trained in the visit are sent; the target block is always exact"
    )
    keep_ratio: float = Field(1.0, gt=0, le=1, description="share of an inactive matrix kept, by magnitude; 1 is all")
    drop_ratio: float = Field(0.0, ge=0, lt=1, description="share of the other layers that a client skips in a visit")


class BlocksConfig(Section):
    granularity: Literal["layer", "attention-mlp", "matrix"] = Field("layer", description="what one block is")
    group_size: int = Field(1, ge=1, description="consecutive layers in one block (granularity layer)")
    embeddings: Literal["out", "in", "always"] = Field("out", description="frozen, a block, or trained in every visit")
    head: Literal["out", "in", "always"] = Field("out", description="as embeddings; a random head is always trained")
    norm: Literal["out", "in", "always"] = Field("out", description="as embeddings, for norms after the last layer")
    schedule: Literal["ascending", "descending", "random", "rotating", "fixed", "full", "aggregate"] = Field(
        "random", description="order of the blocks; fixed never switches, full trains the whole model in every visit"
    )
    first_block: int = Field(0, ge=0, description="the block of schedule fixed")
    parallel_blocks: int = Field(1, ge=1, description="blocks visited in one round")
    clients_per_block: int = Field(1, ge=1, description="clients that visit a block in one round; deltas are averaged")
    optimizer_state: Literal["reset", "server", "client"] = Field(
        "reset", description="start of a visit's optimiser state: fresh, the server's per block, or the client's own"
    )
    learning_rate_over: Literal["visit", "run"] = Field(
        "visit", description="what train.scheduler runs over: the steps of a visit, or the rounds"
    )
    upload: Literal["float32", "bfloat16", "int8"] = Field(
        "float32", description="form of the uploaded delta; int8 with error feedback on the client"
    )
    zstandard: bool = Field(True, description="compress block frames without loss where that makes them smaller")
    download: BlockDownloadConfig = BlockDownloadConfig()


class ReportConfig(Section):
    linear_probe: bool = Field(
        False,
        description="let fs-fwdllm plan fit a logistic regression on the frozen features of all clients' training rows "
        "and print its accuracy on the evaluation split, as a reference; it takes a forward pass a row",
    )


class FwdllmConfig(Section):
    estimator: str = Field(
        "central",
        description="where slopes come from: forward passes (central, one_sided, forward_mode), the closed form of the "
        "output layer (closed_form), or backpropagation (projected)",
    )
    direction: str = Field("rademacher", description="distribution of a direction")
    directions: Literal["own", "common", "groups"] = Field(
        "own",
        description="whose directions are looked along: each client's own, the same ones by all clients of a round "
        "(the server then sends probes numbers a step in all; of slopes that cost no pass they are the rows of an "
        "orthogonal matrix), or the same ones within each of direction_groups groups of clients",
    )
    direction_groups: int = Field(
        10, ge=1, description="groups of clients that share directions, with directions groups: a client's number tells"
    )
    probes: int = Field(1, ge=1, description="directions per step: one slope each is measured and sent")
    radius: float = Field(1e-3, gt=0, description="distance of a perturbed point (the papers' epsilon, mu or h)")
    radius_scale: Literal["absolute", "relative"] = Field(
        "absolute", description="relative: the perturbation is radius times the norm of the trainables long"
    )
    probes_per_batch: int = Field(
        1,
        ge=1,
        description="directions evaluated in one batched (vmap) forward pass; 2 batches both points of a single one",
    )
    parts: list[PartConfig] = Field(
        [],
        description="trainables by parts, [{match, slopes, probes or scalars, rate}]; empty is all of them as one",
    )
    fleet: list[FleetConfig] = Field(
        [],
        description="clients that measure in their own way, [{clients, slopes, probes or scalars}]; others do as "
        "fwdllm.parts or fwdllm.estimator say",
    )
    weigh_by: Literal["precision", "samples"] = Field(
        "precision",
        description="weights of clients that send different numbers of slopes for a part: samples over the noise that "
        "each brings, or samples alone",
    )
    upload: Literal["scalars", "dense"] = Field("scalars", description="what a client that measures slopes sends")
    server_optimizer: Literal["sgd", "adam"] = Field(
        "sgd", description="what the server steps with on the rebuilt gradient; sgd has server_momentum"
    )
    first_rate: Literal["given", "safe"] = Field(
        "given",
        description="train.optimizer.lr as it is given; safe, for a linear classifier on standardised features, finds "
        "it from the curvature and the number of slopes, without a sweep",
    )
    rate_for_trainables: int = Field(
        0,
        ge=0,
        description="number of trainables with which train.optimizer.lr was found; with more it is lowered as the "
        "noise of the estimate grows; 0 takes it as it is",
    )
    server_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the server on the rebuilt gradient")
    server_betas: list[float] = Field(
        [0.9, 0.999],
        min_length=2,
        max_length=2,
        description="decay rates (at least 0, below 1) of Adam's running means of the rebuilt gradient and its square",
    )
    server_epsilon: float = Field(
        1e-8, description="what Adam adds to the root of the squares' mean before it divides by it; at least 1e-16"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations wherever there is backpropagation")
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto", description="attention kernel; auto is eager for forward_mode and batched probes, else the default"
    )
    base_dtype: Literal["", "auto", "float32", "bfloat16", "float16"] = Field(
        "", description="former name of fwdllm.base.compute_dtype"
    )
    pooling: str = Field(
        "auto",
        description="how a classifier makes one vector of a text's tokens: auto (as the model's modules.json says, the "
        "architecture's own head without one), none (that head), or cls, max, mean, mean_sqrt_len, weightedmean, "
        "lasttoken, several joined by +; then a linear classifier reads it",
    )
    feature_scale: Literal["auto", "none", "unit", "layer_norm"] = Field(
        "auto",
        description="what is done to that vector: nothing, unit (its length is one), or layer_norm (its own mean taken "
        "away, its own deviation made one), which auto is for a new head",
    )
    prefix_cache_mib: int = Field(256, ge=0, description="memory for activations below the lowest trainable layer")
    strategy_span: float = Field(
        -1.0, description="farthest train.train_strategy moves a learning rate; -1 is half of the schedule's rate"
    )
    max_failed_rounds: int = Field(3, ge=1, description="rounds in a row without a usable update before giving up")
    deadline_s: float = Field(
        600.0, gt=0, description="seconds a host of several processes waits for clients to join, to answer, to evaluate"
    )
    bind_host: str = Field(
        "",
        description="address at which a participant of a distributed FederatedScope run listens, where others reach it "
        "by another one (distribute.server_host, distribute.client_host); 0.0.0.0 or :: is all of its own; empty is "
        "that one",
        json_schema_extra={"host_only": True},
    )
    min_answers: int = Field(1, ge=1, description="answers that let a round go on when its deadline is over")
    checkpoint_every: int = Field(1, ge=1, description="rounds between checkpoints; the last round always has one")
    first_evaluation: Literal["auto", "always", "never"] = Field(
        "auto",
        description="whether to evaluate the model before the first round; auto where that is at most a tenth of all "
        "that training takes",
    )
    saved_round: Literal["best", "last"] = Field(
        "best",
        description="the round in adapter/ (or model/); with best, by eval.best_res_update_round_wise_key, the last is "
        "beside it in adapter-last/",
    )
    init_adapter: str = Field(
        "", description="start from the adapter (or model) in this folder: of a run, or PEFT's; empty starts anew"
    )
    accept_changed_inputs: bool = Field(
        False, description="continue a run although its data or its model's files have changed since"
    )
    check_saved: bool = Field(
        True, description="load what a run has saved at its end, and compare it with the run's own evaluation"
    )
    tensorboard: bool = Field(False, description="also write TensorBoard event files, into the run folder")
    log_clients: bool = Field(
        False, description="send TensorBoard and Weights & Biases each client's loss and learning rate, too"
    )
    tls: TlsConfig = TlsConfig()
    base: BaseConfig = BaseConfig()
    robust: RobustConfig = RobustConfig()
    gate: GateConfig = GateConfig()
    sampling: SamplingConfig = SamplingConfig()
    step: StepConfig = StepConfig()
    data: FwdllmDataConfig = FwdllmDataConfig()
    blocks: BlocksConfig = BlocksConfig()
    report: ReportConfig = ReportConfig()
    ext: dict[str, Any] = Field({}, description="sections of other packages, by the name that they announce")

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, given: Any) -> Any:
        """``base_dtype`` where ``base.compute_dtype`` is today."""
        if not isinstance(given, dict) or not given.get("base_dtype") or not isinstance(given.get("base", {}), dict):
            return given
        rest = {name: value for name, value in given.items() if name != "base_dtype"}
        dtype, base = given["base_dtype"], given.get("base", {})
        if base.get("compute_dtype", dtype) != dtype:
            raise ValueError(f"base_dtype is {dtype!r}, its present name base.compute_dtype {base['compute_dtype']!r}")
        return {**rest, "base": {**base, "compute_dtype": dtype}}

    @model_validator(mode="after")
    def _groups_are_asked_for(self) -> FwdllmConfig:
        usual = type(self).model_fields["direction_groups"].default
        if self.directions != "groups" and self.direction_groups != usual:
            raise ValueError(
                f"direction_groups {self.direction_groups} divides clients that share directions; set directions to "
                "groups, or leave it out"
            )
        return self

    @field_validator("estimator")
    @classmethod
    def _estimator_is_known(cls, value: str) -> str:
        return known_word(ESTIMATORS, value)

    @field_validator("pooling")
    @classmethod
    def _pooling_is_known(cls, value: str) -> str:
        """In one order, whatever order it was given in."""
        words = value.split("+")
        if len(words) == 1:
            return known_word(("auto", "none", *POOLING_WORDS), value)
        words = [known_word(POOLING_WORDS, word.strip()) for word in words]
        return "+".join(word for word in POOLING_WORDS if word in words)

    @field_validator("direction")
    @classmethod
    def _direction_is_known(cls, value: str) -> str:
        return known_word(DIRECTIONS, value)

    @field_validator("server_betas")
    @classmethod
    def _betas_are_decay_rates(cls, value: list[float]) -> list[float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be at least 0 and below 1")
        return value

    @field_validator("server_epsilon")
    @classmethod
    def _epsilon_outlasts_squares(cls, value: float) -> float:
        if not value >= 1e-16:
            raise ValueError("must be at least 1e-16: float32 loses a small gradient's square before the gradient")
        return value

    @field_validator("strategy_span")
    @classmethod
    def _span_is_a_distance(cls, value: float) -> float:
        if value < 0 and value != -1:
            raise ValueError("must not be negative, except -1 for half of the schedule's rate")
        return value

    @field_validator("ext")
    @classmethod
    def _sections_are_announced(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Each section as its package's own model says, defaults filled in; as plain values, which a file can hold."""
        return {name: _extension(name, section) for name, section in value.items()}


def _extension(name: str, section: Any) -> dict[str, Any]:
    if name not in EXTENSIONS:
        known = EXTENSIONS.names()
        raise ValueError(f"no installed package announces a section {name!r}; known are {known}{nearest(name, known)}")
    model: type[Section] = EXTENSIONS[name]
    try:
        return model.model_validate({} if section is None else section).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, [name, *first["loc"]]))
        hint = nearest(first["loc"][-1], model.model_fields) if first["type"] == "extra_forbidden" else ""
        raise ValueError(f"{key}: {first['msg']}{hint}") from error
