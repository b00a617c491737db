"""``fwdllm.robust``: how far a server believes a single client (:mod:`fs_fwdllm.guard`)."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fs_fwdllm.config.section import Section

__all__ = ["RobustConfig"]

_TIMES = {"median_norm": 1.0, "none": None}


class RobustConfig(Section):
    clip: str = Field(
        "median_norm",
        description="how long a client's update may be: median_norm, the median of the round's clients (part by part; "
        "where fewer than three answer, of the last ones that were believed), a number of times that (in quotes inside "
        "FederatedScope), or none for any length",
    )
    samples: float = Field(
        10.0,
        ge=0,
        description="how many times the median of the round's clients a client's samples count at most; 0 believes any "
        "number that its steps can hold",
    )

    statistic: Literal["mean", "trimmed", "median", "krum"] = Field(
        "mean",
        description="what clients that share directions (fwdllm.directions common or groups) say together, after clip: "
        "their mean, or number by number the mean without the largest and smallest share liars, or the median; or the "
        "mean of the clients that are nearest to each other (multi-Krum)",
    )
    liars: float = Field(
        0.2, ge=0, lt=0.5, description="share of a set's clients that are expected to lie (statistic trimmed, krum)"
    )

    @field_validator("clip", mode="before")
    @classmethod
    def _is_a_word_or_a_number(cls, value: Any) -> Any:
        """As text, since FederatedScope's keys have values of one type."""
        if isinstance(value, str) and value in _TIMES:
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError("allowed are median_norm, none, or a number above 0")
        return f"{number:g}"

    @model_validator(mode="after")
    def _liars_are_asked_for(self) -> RobustConfig:
        if self.statistic not in ("trimmed", "krum") and self.liars != type(self).model_fields["liars"].default:
            raise ValueError(
                f"robust.liars {self.liars:g} is how many a vote leaves out; set robust.statistic to trimmed or krum, "
                "or leave it out"
            )
        return self

    @property
    def times_median(self) -> float | None:
        """``clip`` as a number of times the median; ``None`` for none."""
        return _TIMES[self.clip] if self.clip in _TIMES else float(self.clip)

    @property
    def samples_times_median(self) -> float | None:
        """``samples``, or ``None`` where it bounds nothing."""
        return self.samples or None
