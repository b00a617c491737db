"""``fwdllm.base``: how the frozen base is held, and in what it computes (:mod:`fs_fwdllm.model.base`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fs_fwdllm.config.section import Section

__all__ = ["BaseConfig"]


class BaseConfig(Section):
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype in which the frozen base computes, and in which it is held where it is not packed (block "
        "training: of the model); auto is float32, or float16 with train.is_enable_half",
    )
    quantise: Literal["none", "int8", "int4", "nf4"] = Field(
        "none",
        description="pack the linear layers of a float base as they are read; a base that is packed already (as "
        "fs-fwdllm quantise, bitsandbytes, GPTQ, AWQ, compressed-tensors or llama.cpp leave it) needs no key",
    )
    group: int = Field(64, ge=8, description="neighbouring weights that share a scale, where they are packed here")
    symmetric: bool = Field(True, description="whether groups of int8 and int4 have no zero of their own")
    stream: bool = Field(
        False,
        description="leave the base on the disk and read each matrix when it is used, once for all passes that go side "
        "by side (base.passes_per_read)",
    )
    passes_per_read: int = Field(
        8,
        ge=1,
        description="passes over a base on the disk that go side by side and share what is read: perturbed points that "
        "fwdllm.probes_per_batch does not put into one pass, batches of an evaluation, simulated clients that stand at "
        "one point; each holds its activations",
    )
    folder: str = Field(
        "", description="where the packed base is written, and read from the next time; empty packs it in every run"
    )

    @model_validator(mode="after")
    def _packing_is_asked_for(self) -> BaseConfig:
        """How to pack is said only where something is packed."""
        others = {"group": self.group, "symmetric": self.symmetric, "folder": self.folder}
        said = [name for name, value in others.items() if value != type(self).model_fields[name].default]
        if not self.stream and self.passes_per_read != type(self).model_fields["passes_per_read"].default:
            raise ValueError(
                f"base.passes_per_read {self.passes_per_read} is about a base on the disk; set base.stream true, or "
                "leave it out"
            )
        if self.quantise == "none" and said:
            raise ValueError(
                f"base.{said[0]} says how a base is packed, but base.quantise is none; choose int8, int4 or nf4"
            )
        if self.stream and self.quantise != "none" and not self.folder:
            raise ValueError(
                "base.stream reads a packed base from its folder: name one in base.folder, where it is written once, "
                "or write it with fs-fwdllm quantise"
            )
        if self.quantise == "nf4" and not self.symmetric:
            raise ValueError("base.symmetric: nf4 has no zeros, so it cannot be false")
        return self
