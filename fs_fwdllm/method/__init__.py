"""Federated methods: a client's worker, a server, and a recipe that combines them from shared parts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
