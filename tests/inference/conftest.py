"""A fresh small world for every test, and one trained classifier and one trained language model for the module."""

from __future__ import annotations

from tests.host.conftest import _no_pictures
from tests.host.fixtures import models, world

__all__ = ["_no_pictures", "models", "world"]
