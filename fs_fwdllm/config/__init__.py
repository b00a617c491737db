"""One YAML shape for every host: FederatedScope's keys, plus one section ``fwdllm`` for what it has no word for.

:mod:`fs_fwdllm.config.schema` holds the sections as typed models, :mod:`fs_fwdllm.config.load` reads a file, applies
``key value`` overrides and turns every mistake into a :class:`~fs_fwdllm.errors.ConfigError` that names the key, the
value, what is allowed and the nearest known key.
"""

from fs_fwdllm.config.load import dump_config, load_config, parse_config
from fs_fwdllm.config.schema import Config

__all__ = ["Config", "dump_config", "load_config", "parse_config"]
