"""FZOO as a plugin: MeZO's steps, divided by how much the slopes of a step differ (after arXiv 2506.09034)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fs_fwdllm.config.methods import MethodFacts
from fs_fwdllm.config.schema import Config, Section
from fs_fwdllm.method.mezo.recipe import Coefficients, local_step_recipe


class Settings(Section):
    """``fwdllm.ext.fzoo`` in a configuration file."""

    floor: float = Field(1e-8, gt=0, description="the smallest spread that a step is divided by")


def coefficients_of(config: Config) -> Coefficients:
    floor = config.extension("fzoo").floor

    def coefficients(slopes: np.ndarray, rate: float) -> np.ndarray:
        spread = np.maximum(slopes.std(axis=-1, keepdims=True), floor)
        return -rate / slopes.shape[-1] * slopes / spread

    return coefficients


RECIPE = local_step_recipe(coefficients_of)

FACTS = MethodFacts(
    name="fzoo",
    title="FZOO",
    spellings=(("fzoo", "fzootrainer"), ("fzoo", "")),
    recipe="fzoo:RECIPE",
    measures_slopes=True,
    clients_step=True,
)
