"""The sections of a configuration file, as typed models.

A field's ``description`` is its documentation everywhere: the README's tables and error messages use the same words.
Fields marked *host only* belong to FederatedScope and are accepted, so that one file serves every host, but mean
nothing outside it; :meth:`Config.ignored_keys` lists those a file sets.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

__all__ = ["Config", "FwdllmConfig", "FwdllmDataConfig", "Section", "is_host_only"]


class Section(BaseModel):
    """A section: unknown keys are errors, assignment is validated, types are not coerced (an int may be a float)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=True, validate_default=True
    )


def host_only(default: Any) -> Any:
    return Field(default, description="host only", json_schema_extra={"host_only": True})


def is_host_only(field: FieldInfo) -> bool:
    """Whether ``field`` means something to FederatedScope only."""
    return isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("host_only"))


class FederateConfig(Section):
    mode: Literal["standalone", "distributed"] = host_only("standalone")
    method: str = Field("FedAvg", description="FedAvg, FedSGD, fedmezo or fedfwd; case does not matter")
    client_num: int = Field(0, ge=0, description="number of clients; 0 takes the number the data has by nature")
    sample_client_num: int = Field(-1, ge=-1, description="clients per round; -1 is all")
    sample_client_rate: float = Field(-1.0, le=1.0, description="share of clients per round; -1 uses sample_client_num")
    total_round_num: int = Field(50, ge=1, description="rounds")
    sampler: Literal["uniform", ""] = Field("uniform", description="how the clients of a round are drawn")
    ignore_weight: bool = Field(False, description="weigh clients equally instead of by samples processed")
    make_global_eval: bool = host_only(True)
    merge_test_data: bool = host_only(False)
    merge_val_data: bool = host_only(False)
    share_local_model: bool = host_only(False)
    online_aggr: bool = host_only(False)
    process_num: int = host_only(1)
    data_weighted_aggr: bool = host_only(False)
    save_to: str = host_only("")
    restore_from: str = host_only("")
    save_freq: int = host_only(-1)
    save_client_model: bool = host_only(False)
    unseen_clients_rate: float = host_only(0.0)
    join_in_info: list[Any] = host_only([])
    use_ss: bool = host_only(False)
    use_diff: bool = host_only(False)


class DataConfig(Section):
    root: str = Field("data", description="folder of the data file")
    type: str = Field("", description="NAME@llm, FILE.json@llm, FILE.jsonl@llm, FILE.csv@text or FILE.jsonl@text")
    splits: list[float] = Field([0.8, 0.1, 0.1], description="shares of train, validation and test")
    splitter: str = Field("", description="iid, lda, meta or natural; empty is iid")
    splitter_args: list[dict[str, Any]] = Field([], description="e.g. [{alpha: 0.5}] for lda")
    subsample: float = Field(1.0, gt=0, le=1.0, description="share of the rows to keep")
    args: list[dict[str, Any]] = host_only([])
    file_path: str = host_only("")
    transform: list[Any] = host_only([])
    consistent_label_distribution: bool = host_only(True)
    save_data: bool = host_only(False)
    cSBM_phi: list[float] = host_only([0.5, 0.5, 0.5])

    @field_validator("splits")
    @classmethod
    def _splits_sum_to_one(cls, value: list[float]) -> list[float]:
        if len(value) != 3 or min(value) < 0 or abs(sum(value) - 1.0) > 1e-6:
            raise ValueError("needs three shares that are not negative and sum to 1")
        return value


class AdapterConfig(Section):
    use: bool = Field(False, description="train an adapter; false trains every parameter")
    args: list[dict[str, Any]] = Field(
        [{}],
        description="[{adapter_package: peft, adapter_method: lora, ...}]; methods lora, ia3, layernorm, bitfit, "
        "bottleneck, head; further keys go to the method",
    )
    mv_to_cpu: bool = host_only(False)


class ChatConfig(Section):
    max_history_len: int = host_only(10)
    max_len: int = host_only(100)


class LLMConfig(Section):
    tok_len: int = Field(128, ge=2, description="longest sequence, in tokens; longer text is cut")
    max_new_token: int = host_only(60)
    retry_on_nan_loss: bool = host_only(False)
    chat: ChatConfig = ChatConfig()
    adapter: AdapterConfig = AdapterConfig()
    deepspeed: dict[str, Any] = host_only({})
    offsite_tuning: dict[str, Any] = host_only({})
    cache: dict[str, Any] = host_only({})


class DataloaderConfig(Section):
    batch_size: int = Field(64, ge=1, description="samples per batch; a client with fewer samples uses all it has")
    shuffle: bool = Field(True, description="draw a client's batches in an order keyed by (seed, client, round)")
    type: str = host_only("base")
    num_workers: int = host_only(0)
    drop_last: bool = host_only(False)
    pin_memory: bool = host_only(False)


class ModelConfig(Section):
    type: str = Field("", description="PATH_OR_NAME@huggingface_llm or PATH_OR_NAME@transformers")
    task: str = Field("", description="SequenceClassification for @transformers; empty for language models")
    num_labels: int = Field(0, ge=0, description="classes of a classifier; 0 takes them from the data")
    dropout: float = host_only(0.0)


class OptimizerConfig(Section):
    type: Literal["SGD", "AdamW"] = Field("SGD", description="local optimiser of the backpropagation baselines")
    lr: float = Field(0.1, ge=0, description="learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; biases and norms are exempt")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the local SGD of the baselines")


class SchedulerConfig(Section):
    type: Literal["", "constant", "linear", "cosine"] = Field("", description="learning rate over the rounds")
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the rounds with a linear warm-up")


class TrainConfig(Section):
    local_update_steps: int = Field(1, ge=1, description="local steps per round")
    batch_or_epoch: Literal["batch", "epoch"] = Field("batch", description="unit of local_update_steps")
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    is_enable_half: bool = Field(False, description="hold the frozen base in half precision (see fwdllm.base_dtype)")
    train_strategy: Literal["frozen", "random", "round-wise", "five-round", "model-diff"] = Field(
        "frozen", description="how a client's learning rate follows from the schedule's; frozen takes it as it is"
    )
    data_para_dids: list[int] = host_only([])


class EvalConfig(Section):
    freq: int = Field(1, ge=-1, description="evaluate every N rounds and at the end; -1 only at the end")
    metrics: list[str] = Field([], description="metrics to report besides the loss; empty is all of the task's")
    split: list[str] = Field(["test", "val"], description="splits to evaluate; the first one with samples is used")
    report: list[str] = host_only(["weighted_avg", "avg", "fairness", "raw"])
    best_res_update_round_wise_key: str = host_only("val_loss")
    count_flops: bool = host_only(True)
    monitoring: list[str] = host_only([])
    base: float = host_only(0.0)


class EarlyStopConfig(Section):
    patience: int = host_only(5)
    delta: float = host_only(0.0)
    improve_indicator_mode: str = host_only("best")


class TrainerConfig(Section):
    type: str = Field("", description="mezotrainer, fwdtrainer, llmtrainer; empty follows federate.method")


class CriterionConfig(Section):
    type: str = host_only("CrossEntropyLoss")


class WandbConfig(Section):
    use: bool = Field(False, description="log to Weights & Biases (extra: wandb)")
    name_user: str = Field("", description="entity")
    name_project: str = Field("fs_fwdllm", description="project")
    online_track: bool = Field(True, description="false logs offline")
    client_train_info: bool = host_only(False)


class GradConfig(Section):
    grad_clip: float = host_only(-1.0)
    grad_accum_count: int = host_only(1)


class FwdllmDataConfig(Section):
    text: str = Field("text", description="column or field of the text (FILE@text)")
    label: str = Field("label", description="column or field of the label (FILE@text)")
    columns: list[str] = Field([], description="column names of a CSV file without a header line")
    labels: list[Any] = Field([], description="the classes, in order; empty takes the sorted labels of the data")
    natural: str = Field("", description="field that names a row's client, for data.splitter natural")
    category: str = Field("", description="field that data.splitter meta and lda group by; empty is the task's own")
    test_file: str = Field("", description="file in data.root whose rows are the test split, instead of a share")
    max_test_samples: int = Field(0, ge=0, description="evaluate on this many test samples (seeded draw); 0 is all")


class FwdllmConfig(Section):
    estimator: Literal["central", "one_sided", "forward_mode"] = Field(
        "central", description="how a slope along a direction is measured"
    )
    direction: Literal["rademacher", "gaussian"] = Field("rademacher", description="distribution of a direction")
    probes: int = Field(1, ge=1, description="directions evaluated per step")
    radius: float = Field(1e-3, gt=0, description="distance of a perturbed point (the papers' epsilon, mu or h)")
    probes_per_batch: int = Field(
        1,
        ge=1,
        description="directions evaluated in one batched (vmap) forward pass; 2 batches both points of a single one",
    )
    upload: Literal["scalars", "dense"] = Field("scalars", description="what a forward-only client sends")
    server_momentum: float = Field(0.0, ge=0, lt=1, description="momentum of the server on the rebuilt gradient")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backprop baselines")
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto", description="attention kernel; auto is eager for forward_mode and batched probes, else the default"
    )
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype of the frozen base; auto is float32, or float16 with train.is_enable_half"
    )
    prefix_cache_mib: int = Field(256, ge=0, description="memory for activations below the lowest trainable layer")
    strategy_span: float = Field(5e-6, ge=0, description="farthest train.train_strategy moves a learning rate")
    max_failed_rounds: int = Field(3, ge=1, description="rounds in a row without a usable update before giving up")
    deadline_s: float = Field(
        600.0, gt=0, description="seconds a host of several processes waits for clients to join, to answer, to evaluate"
    )
    min_answers: int = Field(1, ge=1, description="answers that let a round go on when its deadline is over")
    checkpoint_every: int = Field(1, ge=1, description="rounds between checkpoints; the last round always has one")
    tensorboard: bool = Field(False, description="also write TensorBoard event files")
    data: FwdllmDataConfig = FwdllmDataConfig()


class Config(Section):
    """A whole configuration. Build it with :func:`fs_fwdllm.config.load_config`."""

    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything random")
    outdir: str = Field("runs", description="folder that receives the run folder")
    expname: str = Field("", description="name of the run folder; empty takes the configuration file's")
    use_gpu: bool = Field(False, description="run on the accelerator if there is one")
    device: int = Field(-1, ge=-1, description="index of the accelerator")
    threads: int = Field(0, ge=0, description="threads of the numeric library; 0 leaves its default")
    backend: str = host_only("torch")
    verbose: int = host_only(1)
    expname_tag: str = host_only("")
    print_decimal_digits: int = host_only(6)
    federate: FederateConfig = FederateConfig()
    data: DataConfig = DataConfig()
    llm: LLMConfig = LLMConfig()
    dataloader: DataloaderConfig = DataloaderConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    trainer: TrainerConfig = TrainerConfig()
    criterion: CriterionConfig = CriterionConfig()
    grad: GradConfig = GradConfig()
    eval: EvalConfig = EvalConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    wandb: WandbConfig = WandbConfig()
    distribute: dict[str, Any] = host_only({})
    aggregator: dict[str, Any] = host_only({})
    fwdllm: FwdllmConfig = FwdllmConfig()

    def ignored_keys(self) -> list[str]:
        """Dotted names of the keys this configuration sets that only FederatedScope gives a meaning to."""
        found: list[str] = []

        def visit(section: Section, prefix: str) -> None:
            for name in sorted(section.model_fields_set):
                value = getattr(section, name)
                if isinstance(value, Section):
                    visit(value, f"{prefix}{name}.")
                elif is_host_only(type(section).model_fields[name]):
                    found.append(prefix + name)

        visit(self, "")
        return found
