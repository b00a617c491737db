"""What FederatedScope's registries are told, on import. Of the host, only ``federatedscope.register`` is imported here.

The host calls every registered callable for every name, and takes the first answer that is not ``None``. So each
callable here first asks whether the run is one of ours; for all others it returns ``None`` and nothing has changed.
"""

from __future__ import annotations

import sys
from typing import Any

import federatedscope.register as host

from fs_fwdllm.host.federatedscope.messages import provide_messages

__all__: list[str] = []

#: Names under which the callables are kept; the host only ever iterates over the values.
_NAME = "fs_fwdllm"


def _extend_config(config: Any) -> None:
    from fs_fwdllm.host.federatedscope.settings import extend_host_config

    extend_host_config(config)


def _load_data(config: Any, client_configs: Any) -> Any:
    from fs_fwdllm.host.federatedscope.data import load_data

    return load_data(config, client_configs)


def _build_model(model_config: Any, input_shape: Any) -> Any:
    from fs_fwdllm.host.federatedscope.run_state import current_model

    return current_model()


def _trainer_class(trainer_type: str) -> Any:
    from fs_fwdllm.config.methods import is_ours

    if not is_ours("", trainer_type):
        return None
    from fs_fwdllm.host.federatedscope.trainer import EvaluationTrainer

    return EvaluationTrainer


def _worker_classes(method: str) -> Any:
    from fs_fwdllm.host.federatedscope.run_state import is_active

    if not is_active():
        return None
    from fs_fwdllm.host.federatedscope.client import FwdLLMClient
    from fs_fwdllm.host.federatedscope.server import FwdLLMServer

    return {"client": FwdLLMClient, "server": FwdLLMServer}


def _splitter(kind: str, client_num: int, **arguments: Any) -> Any:
    from fs_fwdllm.host.federatedscope.splitter import make_splitter

    return make_splitter(kind, client_num, **arguments)


def _metric(wanted: str) -> Any:
    def find(types: list[str]) -> Any:
        from fs_fwdllm.host.federatedscope.trainer import host_metric

        return host_metric(wanted) if wanted in types else None

    return find


def _show_plainly() -> None:
    """From here on an error of ours ends the process with one line that says what to do, and no traceback."""
    from fs_fwdllm.errors import FwdLLMError

    before = sys.excepthook

    def show(kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, FwdLLMError):
            print(f"error: {kind.__name__}: {error}", file=sys.stderr)
        else:
            before(kind, error, trace)

    sys.excepthook = show


def _register() -> None:
    from fs_fwdllm.evaluation.names import numbers

    host.register_config(_NAME, _extend_config)
    host.register_data(_NAME, _load_data)
    host.register_model(_NAME, _build_model)
    host.register_trainer(_NAME, _trainer_class)
    host.register_worker(_NAME, _worker_classes)
    host.register_splitter(_NAME, _splitter)
    for name in numbers():
        host.register_metric(f"{_NAME}.{name}", _metric(name))


provide_messages(sys.modules["federatedscope"])
_register()
_show_plainly()
