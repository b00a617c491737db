"""Federated fine-tuning of language models on devices that can run a model but cannot train it by backpropagation.

The decision everything rests on: a perturbation is never a tensor that travels, it is a seed. A client that measured
the slope ``g`` of its loss along the direction ``z(seed)`` uploads the scalar; whoever knows ``(seed, g)`` rebuilds the
update, bit for bit, on any machine.

Start with ``fs-fwdllm run --cfg demo``, or from Python::

    from fs_fwdllm import load_config, run
    folder = run(load_config("demo"))

The parts, from the bottom up: :mod:`~fs_fwdllm.core` (seeded directions, replay from scalars to updates, what travels),
:mod:`~fs_fwdllm.data` and :mod:`~fs_fwdllm.model`, :mod:`~fs_fwdllm.estimator` (slopes), :mod:`~fs_fwdllm.method`
(client and server), :mod:`~fs_fwdllm.running` (a run on any host), :mod:`~fs_fwdllm.host` (processes and messages).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
