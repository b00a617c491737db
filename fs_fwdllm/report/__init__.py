"""What a run leaves behind, and how it is read again.

* :mod:`~fs_fwdllm.report.folder`: the run folder, the one place that knows the names of its files.
* :mod:`~fs_fwdllm.report.sinks`: one line a round for every sink: ``metrics.jsonl``, TensorBoard, Weights & Biases.
* :mod:`~fs_fwdllm.report.traffic`: ``bytes.csv``, the bytes of each client in each round.
* :mod:`~fs_fwdllm.report.console`: a live bar on a terminal, one plain line a round elsewhere, and ``console.log``;
  :mod:`~fs_fwdllm.report.terminal` breaks lines and lays out tables, :mod:`~fs_fwdllm.report.pace` knows what is left.
* :mod:`~fs_fwdllm.report.reporter`: the three above behind two calls, ``round`` and ``finish``.
* :mod:`~fs_fwdllm.report.record`: a run read back from its files, for pictures and comparisons.
* :mod:`~fs_fwdllm.report.plot`: one run in a picture, :mod:`~fs_fwdllm.report.summary` in a table,
  :mod:`~fs_fwdllm.report.classes` by class.
* :mod:`~fs_fwdllm.report.compare`: several runs in a picture and tables; :mod:`~fs_fwdllm.report.groups` says which
  belong together and what sets the others apart.
* :mod:`~fs_fwdllm.report.cost`: what runs cost, measured, and how long other devices would take, modelled.

The files are the truth: the picture and the tables are drawn from them, never from the state of a living run.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
