"""Small federations for tests of models that a whole run trains."""

from __future__ import annotations

from tests.host.fixtures import models, world

__all__ = ["models", "world"]
