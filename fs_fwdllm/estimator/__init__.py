"""Slope estimators: central and one-sided differences, exact forward mode; and backpropagation for the baselines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
