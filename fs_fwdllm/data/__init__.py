"""Data: from a file and a configuration to tokenised examples on numbered clients, and from those to batches.

======================================  ================================================================
:mod:`~fs_fwdllm.data.federated`        the whole way, :func:`load_federated_data`
:mod:`~fs_fwdllm.data.readers`          what ``data.type`` means, and which fields a row has
:mod:`~fs_fwdllm.data.sources`          rows, test split and clients of any of these
:mod:`~fs_fwdllm.data.files`            JSON, JSON lines, CSV, TSV
:mod:`~fs_fwdllm.data.h5.files`         FedNLP's and FwdLLM's data files; ``h5_writing`` writes them
:mod:`~fs_fwdllm.data.h5.partition_files`  their partition files; ``partitioning`` deals the rows
:mod:`~fs_fwdllm.data.h5.builders`         from the original files of data sets to both
:mod:`~fs_fwdllm.data.squad`            questions about contexts
:mod:`~fs_fwdllm.data.docstrings`       the data set every installation has
:mod:`~fs_fwdllm.data.tokenising`       from rows to examples, by task
:mod:`~fs_fwdllm.data.templates`        prompts, label masks, label words, tokens
:mod:`~fs_fwdllm.data.splitters`        who holds which rows
:mod:`~fs_fwdllm.data.batches`          padded batches as a pure function of (examples, client, round)
:mod:`~fs_fwdllm.core.seeding`          random numbers named by their purpose
======================================  ================================================================
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
