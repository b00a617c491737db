"""What every holder of a model must compute alike, bit for bit: directions, replay, trainables, frames, seeds, rates.

Everything here runs with numpy alone, so that a device without PyTorch imports it. Tensors of PyTorch are taken where
they are given: the same arithmetic, on whatever the trainables are (:mod:`~fs_fwdllm.core.arrays`).
"""
