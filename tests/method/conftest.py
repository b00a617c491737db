"""A fresh small world for every test."""

from tests.host.fixtures import models, world

__all__ = ["models", "world"]
