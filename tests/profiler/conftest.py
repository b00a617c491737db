"""A fresh small world for every test."""

from __future__ import annotations

from tests.host.fixtures import models, world

__all__ = ["models", "world"]
