"""The sections of FederatedScope, with its own keys: ``federate``, ``data``, ``llm``, ``model``, ``train``, ``eval``...

Fields marked *host only* are accepted, so that one file serves every host, but mean nothing outside it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from fs_fwdllm.config.methods import DEFAULT_METHOD
from fs_fwdllm.config.section import Section, host_only, known_word

__all__ = [
    "LOSS_WORDS",
    "CriterionConfig",
    "DataConfig",
    "DataloaderConfig",
    "EarlyStopConfig",
    "EvalConfig",
    "FederateConfig",
    "GradConfig",
    "LLMConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "TrainerConfig",
    "WandbConfig",
]


class FederateConfig(Section):
    mode: Literal["standalone", "distributed"] = host_only("standalone")
    method: str = Field(DEFAULT_METHOD, description="the method's protocol; case does not matter")
    client_num: int = Field(0, ge=0, description="number of clients; 0 takes the number the data has by nature")
    sample_client_num: int = Field(-1, ge=-1, description="clients per round; -1 is all")
    sample_client_rate: float = Field(
        -1.0, le=1.0, description="share of clients per round, at least one; above 0 it goes before sample_client_num"
    )
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
    save_to: str = Field(
        "",
        description="also save there: the best round in PATH, the last in final_PATH; a folder each, without .ckpt",
    )
    restore_from: str = Field("", description="start from the adapter in this folder, as fwdllm.init_adapter")
    save_freq: int = Field(
        -1, ge=-1, description="with save_to: also save every N-th round, as N_PATH; not above 0 is never"
    )
    save_client_model: bool = host_only(False)
    unseen_clients_rate: float = host_only(0.0)
    join_in_info: list[Any] = host_only([])
    use_ss: bool = host_only(False)
    use_diff: bool = host_only(False)


class DataConfig(Section):
    root: str = Field("data", description="folder of the data file")
    type: str = Field(
        "", description="NAME@llm, FILE@llm, FILE@text or FILE@qa; FILE ends in .json, .jsonl, .csv, .tsv, .txt or .h5"
    )
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
        "bottleneck, output_residual, head; further keys go to the method",
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
    task: str = Field("", description="SequenceClassification or QuestionAnswering; empty for language models")
    num_labels: int = Field(
        0, ge=0, description="classes of a classifier; 0 takes them from the data, 1 is regression: labels are numbers"
    )
    dropout: float = host_only(0.0)


class OptimizerConfig(Section):
    type: Literal["SGD", "AdamW", "Adam", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta"] = Field(
        "SGD", description="local optimiser of block training; the backpropagation baselines have SGD and AdamW"
    )
    lr: float = Field(0.1, ge=0, description="learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay; biases and norms are exempt")
    momentum: float = Field(0.0, ge=0, lt=1, description="momentum of SGD (block training also: RMSprop)")


class SchedulerConfig(Section):
    type: Literal["", "constant", "linear", "cosine"] = Field(
        "", description="learning rate over the rounds (block training: see fwdllm.blocks.learning_rate_over)"
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of the rounds with a linear warm-up")


class TrainConfig(Section):
    local_update_steps: int = Field(1, ge=1, description="local steps per round")
    batch_or_epoch: Literal["batch", "epoch"] = Field("batch", description="unit of local_update_steps")
    optimizer: OptimizerConfig = OptimizerConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    is_enable_half: bool = Field(
        False, description="hold the frozen base in half precision (see fwdllm.base.compute_dtype)"
    )
    train_strategy: Literal["frozen", "random", "round-wise", "five-round", "model-diff"] = Field(
        "frozen", description="how a client's learning rate follows from the schedule's; frozen takes it as it is"
    )
    data_para_dids: list[int] = host_only([])


#: FederatedScope's words for the loss among the metrics.
LOSS_WORDS = ("loss", "avg_loss", "total")


class EvalConfig(Section):
    freq: int = Field(1, ge=-1, description="evaluate every N rounds and at the end; -1 only at the end")
    metrics: list[str] = Field([], description="metrics to report besides the loss; empty is all of the task's")
    split: list[str] = Field(
        ["test", "val"], min_length=1, description="splits to evaluate; the first one with samples is used"
    )
    report: list[str] = host_only(["weighted_avg", "avg", "fairness", "raw"])
    best_res_update_round_wise_key: str = Field(
        "val_loss",
        description="what the best round is chosen by: SPLIT_METRIC, SPLIT val or test; where that split has no "
        "sample, the same metric of the split that is evaluated",
    )
    count_flops: bool = host_only(True)

    @property
    def judged_by_loss(self) -> bool:
        """Whether the loss is the first metric that is asked for."""
        return bool(self.metrics) and self.metrics[0] in LOSS_WORDS

    monitoring: list[str] = host_only([])
    base: float = host_only(0.0)

    @field_validator("split")
    @classmethod
    def _splits_are_known(cls, value: list[str]) -> list[str]:
        for name in value:
            known_word(("test", "train", "val"), name)
        return value


class EarlyStopConfig(Section):
    patience: int = Field(
        0, ge=0, description="stop after so many evaluations in a row without improvement; 0 never stops"
    )
    delta: float = Field(0.0, ge=0, description="smallest change of the value that is an improvement")
    improve_indicator_mode: Literal["best", "mean"] = Field(
        "best", description="improved on what: the best so far, or the mean of the last patience evaluations"
    )


class TrainerConfig(Section):
    type: str = Field("", description="the method's local trainer; empty follows federate.method, case does not matter")


class CriterionConfig(Section):
    type: str = host_only("CrossEntropyLoss")


class WandbConfig(Section):
    use: bool = Field(False, description="log to Weights & Biases (extra: wandb)")
    name_user: str = Field("", description="entity")
    name_project: str = Field("fs_fwdllm", description="project")
    online_track: bool = Field(True, description="false logs offline")
    client_train_info: bool = host_only(False)


class GradConfig(Section):
    grad_clip: float = Field(-1.0, description="largest norm of the trained block's gradient; not above 0 is off")
    grad_accum_count: int = Field(1, ge=1, description="batches per optimiser step (block training)")
