"""A whole configuration: FederatedScope's sections, and ours.

A field's ``description`` is its documentation everywhere: the page of all keys and error messages use the same words.
Fields marked *host only* belong to FederatedScope; :meth:`Config.ignored_keys` lists those a file sets.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fs_fwdllm.config.host_sections import (
    CriterionConfig,
    DataConfig,
    DataloaderConfig,
    EarlyStopConfig,
    EvalConfig,
    FederateConfig,
    GradConfig,
    LLMConfig,
    ModelConfig,
    TrainConfig,
    TrainerConfig,
    WandbConfig,
)
from fs_fwdllm.config.methods import MethodFacts, facts_for
from fs_fwdllm.config.own_sections import FwdllmConfig
from fs_fwdllm.config.registries import EXTENSIONS
from fs_fwdllm.config.section import Section, host_only, is_host_only
from fs_fwdllm.errors import ConfigError

__all__ = ["Config", "Section"]


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

    @property
    def method(self) -> MethodFacts:
        """What is known of the method that ``federate.method`` and ``trainer.type`` choose.

        Raises:
            ConfigError: they choose none.
        """
        return facts_for(self.federate.method, self.trainer.type)

    def extension(self, name: str) -> Any:
        """The section ``fwdllm.ext.NAME`` as the model its package announces, all defaults where a file has none."""
        return EXTENSIONS[name].model_validate(self.fwdllm.ext.get(name, {}))

    @property
    def initial_adapter(self) -> str:
        """The folder whose adapter a run starts from; empty if it starts anew.

        Raises:
            ConfigError: two keys name two folders.
        """
        own, hosts = self.fwdllm.init_adapter, self.federate.restore_from
        if own and hosts and own != hosts:
            raise ConfigError(
                f"federate.restore_from {hosts!r}: contradicts fwdllm.init_adapter {own!r}; both say what a run "
                "starts from, so keep one"
            )
        return own or hosts

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
