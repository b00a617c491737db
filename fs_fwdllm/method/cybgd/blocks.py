"""The block plan: which parameters take turns, which are trained in every visit, and which never move.

A block is a set of parameters that is trained while everything else stands still. The plan is data, read off the
model's structure (:mod:`fs_fwdllm.model.structure`), so that an architecture nobody listed has one too:

* a transformer layer is a block, or its attention and its feed-forward part, or each of its matrices with the vectors
  that belong to it, or several layers together;
* what stands before the first layer are the *embeddings*, what stands after the last one is the final *norm* and the
  *head*; each is left out, is a block of its own (norm and head together), or is trained in every visit;
* a parameter that the checkpoint lacks (a classifier's new head) starts from random numbers and is trained in every
  visit, whatever the configuration says of its part.

A parameter that is used twice (an output layer tied to the embeddings) has the place of its first use. Every parameter
is in exactly one block, in the part that is always active, or frozen, and the plan says how large the frozen share is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from fs_fwdllm.config.own_sections import BlocksConfig
from fs_fwdllm.errors import ConfigError, ModelError
from fs_fwdllm.model.base.weights import named_weights
from fs_fwdllm.model.structure import is_norm, transformer_blocks

__all__ = ["Block", "BlockPlan", "block_plan"]


@dataclass(frozen=True)
class Block:
    """Parameters that are trained together.

    Attributes:
        name: for people.
        parameters: names in the model's order.
        layers: numbers of the transformer layers they belong to; empty for embeddings, norm and head.
    """

    name: str
    parameters: tuple[str, ...]
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockPlan:
    """What may change, in turns.

    Attributes:
        blocks: the cycle. Their number ``D`` is what schedules count in.
        always: trained in every visit beside the target; ``None`` if there is no such parameter.
        layer_names: the transformer layers, for skipping one.
        frozen_count, total_count: parameters that never move, and all.
    """

    blocks: tuple[Block, ...]
    always: Block | None
    layer_names: tuple[str, ...]
    frozen_count: int
    total_count: int

    @property
    def parts(self) -> tuple[Block, ...]:
        """Every set of parameters that may change: the cycle's blocks, then what is always active."""
        return self.blocks if self.always is None else (*self.blocks, self.always)

    def active(self, block: int) -> tuple[int, ...]:
        """Indices into :attr:`parts` of what a visit to ``block`` trains."""
        return (block,) if self.always is None else (block, len(self.blocks))

    def names(self) -> set[str]:
        """Names of all parameters that may change."""
        return {name for part in self.parts for name in part.parameters}

    def describe(self) -> str:
        """One line: how many blocks, what is always active, what is frozen."""
        always = f", {self.always.name} in every visit" if self.always is not None else ""
        share = self.frozen_count / self.total_count
        return f"{len(self.blocks)} blocks{always}; {share:.2%} of the parameters are frozen"


def block_plan(model: nn.Module, settings: BlocksConfig, fresh: Iterable[str] = ()) -> BlockPlan:
    """The plan of ``model``.

    Args:
        fresh: names of parameters that start from random numbers; they are always active.

    Raises:
        ModelError: no stack of transformer layers was found, or the plan would not be disjoint (a defect).
        ConfigError: ``settings`` leave nothing to train, or do not go together.
    """
    layers = transformer_blocks(model)
    sizes = {name: weight.numel() for name, weight in named_weights(model).items()}
    regions = _regions(model, [name for name, _ in layers])
    # A layer's norms are trained with it, so a fresh parameter can only be one outside the layers.
    always = [name for name in sizes if name in set(fresh)]
    cycle: list[Block] = []
    for region in ("embeddings", "layers", "tail"):
        cycle += _blocks_of(region, regions, layers, settings, set(always))
    always += [name for part in ("embeddings", "norm", "head") if getattr(settings, part) == "always"
               for name in regions[part]]  # fmt: skip
    if settings.schedule == "full":
        cycle = [Block("the whole model", _ordered(sizes, [name for block in cycle for name in block.parameters]),
                       tuple(range(len(layers))))]  # fmt: skip
    kept = _ordered(sizes, always)
    names = [name for name, _ in layers]
    plan = BlockPlan(
        blocks=tuple(cycle),
        always=Block(_always_name(kept, regions), kept) if kept else None,
        layer_names=tuple(names),
        frozen_count=sum(sizes.values()) - sum(sizes[name] for block in cycle for name in block.parameters)
        - sum(sizes[name] for name in kept),
        total_count=sum(sizes.values()),
    )  # fmt: skip
    _check(plan, settings)
    return plan


def _regions(model: nn.Module, layer_names: Sequence[str]) -> dict[str, list[str]]:
    """Names of the parameters outside the layers, by what they are."""
    modules = dict(model.named_modules())
    names = list(named_weights(model))
    inside = [index for index, name in enumerate(names) if _owner_layer(name, layer_names) is not None]
    regions: dict[str, list[str]] = {"embeddings": [], "norm": [], "head": []}
    for index, name in enumerate(names):
        if _owner_layer(name, layer_names) is not None:
            continue
        if index < inside[-1]:
            regions["embeddings"].append(name)
        else:
            regions["norm" if is_norm(modules[name.rpartition(".")[0]]) else "head"].append(name)
    return regions


def _owner_layer(parameter: str, layer_names: Sequence[str]) -> int | None:
    return next((index for index, layer in enumerate(layer_names) if parameter.startswith(f"{layer}.")), None)


def _blocks_of(
    region: str,
    regions: dict[str, list[str]],
    layers: Sequence[tuple[str, nn.Module]],
    settings: BlocksConfig,
    taken: set[str],
) -> list[Block]:
    if region == "layers":
        return _layer_blocks(layers, settings)
    parts = ["embeddings"] if region == "embeddings" else ["norm", "head"]
    wanted = [part for part in parts if getattr(settings, part) == "in"]
    names = [name for part in wanted for name in regions[part] if name not in taken]
    return [Block(" and ".join(part for part in wanted if regions[part]), tuple(names))] if names else []


def _layer_blocks(layers: Sequence[tuple[str, nn.Module]], settings: BlocksConfig) -> list[Block]:
    blocks = []
    if settings.granularity == "layer":
        for first in range(0, len(layers), settings.group_size):
            group = layers[first : first + settings.group_size]
            names = [f"{name}.{own}" for name, layer in group for own in named_weights(layer)]
            title = group[0][0] if len(group) == 1 else f"{group[0][0]} to {group[-1][0]}"
            blocks.append(Block(title, tuple(names), tuple(range(first, first + len(group)))))
        return blocks
    divide = _attention_and_rest if settings.granularity == "attention-mlp" else _matrices
    for index, (name, layer) in enumerate(layers):
        for part, names in divide(layer):
            blocks.append(Block(f"{name} {part}", tuple(f"{name}.{own}" for own in names), (index,)))
    return blocks


def _attention_and_rest(layer: nn.Module) -> list[tuple[str, list[str]]]:
    """A layer's two halves. Norms that stand beside both belong, in their order, half to one and half to the other."""
    parameters = named_weights(layer)
    children = {
        name: child
        for name, child in layer.named_children()
        if any(weight.dim() > 1 for weight in named_weights(child).values())
    }
    attention = [name for name in children if "attn" in name.lower() or "attention" in name.lower()]
    first = [name for name in parameters if name.partition(".")[0] in attention]
    second = [name for name in parameters if name.partition(".")[0] in children and name not in first]
    beside = [name for name in parameters if name not in first and name not in second]
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in beside))
    early = owners[: (len(owners) + 1) // 2]
    first += [name for name in beside if name.rpartition(".")[0] in early]
    second += [name for name in beside if name.rpartition(".")[0] not in early]
    halves = [("attention", first), ("feed-forward", second)]
    return [(part, [name for name in parameters if name in names]) for part, names in halves if names]


def _matrices(layer: nn.Module) -> list[tuple[str, list[str]]]:
    """Each matrix with the vectors of its own module; vectors of modules without one join the first matrix."""
    parameters = named_weights(layer)
    matrices = [name for name, parameter in parameters.items() if parameter.dim() > 1]
    home = {name.rpartition(".")[0]: name for name in reversed(matrices)}
    members: dict[str, list[str]] = {name: [] for name in matrices}
    for name in parameters:
        members[name if name in members else home.get(name.rpartition(".")[0], matrices[0])].append(name)
    return list(members.items())


def _ordered(order: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    wanted = set(names)
    return tuple(name for name in order if name in wanted)


def _always_name(names: Sequence[str], regions: dict[str, list[str]]) -> str:
    return " and ".join(part for part, members in regions.items() if set(members) & set(names))


def _check(plan: BlockPlan, settings: BlocksConfig) -> None:
    named = [name for part in plan.parts for name in part.parameters]
    if len(set(named)) != len(named) or any(not part.parameters for part in plan.parts):
        raise ModelError(f"the block plan is not disjoint, or has an empty block: {plan}")
    if settings.schedule == "fixed" and settings.first_block >= len(plan.blocks):
        raise ConfigError(
            f"fwdllm.blocks.first_block {settings.first_block}: the model has {len(plan.blocks)} blocks; allowed are 0 "
            f"to {len(plan.blocks) - 1}"
        )
    if settings.parallel_blocks > len(plan.blocks):
        raise ConfigError(
            f"fwdllm.blocks.parallel_blocks {settings.parallel_blocks}: the cycle has {len(plan.blocks)} blocks; "
            f"allowed are 1 to {len(plan.blocks)}"
        )
