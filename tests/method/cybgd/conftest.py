"""A fresh small world for every test, and no pictures."""

from tests.host.conftest import _no_pictures
from tests.host.fixtures import models, world

__all__ = ["_no_pictures", "models", "world"]
