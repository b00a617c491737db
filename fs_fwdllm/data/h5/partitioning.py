"""FedNLP's ways to deal a data set to clients, as pure functions of the rows and a seed.

===================  =============================================================================================
``uniform``          rows dealt at random, sizes equal to within one
``niid_label``       label skew: every client has the same number of rows, with label shares drawn from
                     Dirichlet(``alpha`` times the labels' shares in the data). Where a label is used up, the labels
                     that are left fill the gap in proportion to what is left of them; the last client takes the rest
``niid_quantity``    quantity skew: sizes in proportion to Dirichlet(``beta``), but nobody without a row
``natural``          one client per owner
===================  =============================================================================================

Training and test rows are dealt separately but by the same draws, so that a client is tested on the mixture it trains
on. (The published scripts draw anew for the test rows.) Their names are kept: ``uniform_client_1000``,
``niid_label_clients=100_alpha=1.0``, ``niid_quantity_clients=100_beta=5.0``, ``natural``.
"""

from __future__ import annotations

import numpy as np

from fs_fwdllm.core.seeding import seeded_generator, seeded_permutation
from fs_fwdllm.data.splitters import split_iid, split_natural
from fs_fwdllm.errors import ConfigError

__all__ = ["METHODS", "deal_natural", "deal_uniform", "label_skew", "method_name", "quantity_skew"]

METHODS = ("uniform", "niid_label", "niid_quantity", "natural")


def method_name(method: str, clients: int, parameter: float) -> str:
    """The published name of a partition; ``parameter`` is alpha or beta."""
    if method == "uniform":
        return f"uniform_client_{clients}"
    if method == "natural":
        return method
    short = f"{parameter:.1f}"
    value = short if float(short) == parameter else repr(parameter)
    return f"{method}_clients={clients}_{'alpha' if method == 'niid_label' else 'beta'}={value}"


def deal_uniform(rows: int, clients: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each client, int64, ascending."""
    return split_iid(rows, clients, seed)


def deal_natural(train_owners: np.ndarray, test_owners: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Training and test rows of each owner, owners in the order of their codes.

    Test rows whose owner has no training row are dealt evenly to the clients, in their order.

    Args:
        train_owners, test_owners: owner of each row, int64.
    """
    owners = np.unique(train_owners)
    train = split_natural(train_owners, 0)
    strangers = np.array_split(np.flatnonzero(~np.isin(test_owners, owners)), len(owners))
    own = [np.flatnonzero(test_owners == owner) for owner in owners]
    return train, [np.sort(np.concatenate(pair)) for pair in zip(own, strangers, strict=True)]


def label_skew(codes: np.ndarray, clients: int, alpha: float, shares: np.ndarray, seed: int) -> list[np.ndarray]:
    """Deal rows with label skew.

    Args:
        codes: label of each row, int64 ``[rows]``.
        alpha: concentration; above 0. Small: clients know few labels.
        shares: share of each label, float ``[labels]``, by which ``alpha`` is multiplied.

    Returns:
        Row numbers of each client, int64, ascending.

    Raises:
        ConfigError: more clients than rows.
    """
    _check_clients(clients, len(codes))
    order = seeded_permutation(len(codes), "niid_label rows", seed)
    queues = [order[codes[order] == label] for label in range(len(shares))]
    used = np.zeros(len(shares), dtype=np.int64)
    parts = []
    for client in range(clients):
        left = np.array([len(queue) for queue in queues]) - used
        if client == clients - 1:
            taken = left
        else:
            wanted = _proportions(alpha * shares, seed, client) * (len(codes) // clients)
            taken = _take(wanted, left, len(codes) // clients)
        rows = [queue[first : first + count] for queue, first, count in zip(queues, used, taken, strict=True)]
        used = used + taken
        parts.append(np.sort(np.concatenate(rows)))
    return parts


def quantity_skew(rows: int, clients: int, beta: float, seed: int) -> list[np.ndarray]:
    """Deal rows with quantity skew; everybody has one if there are enough.

    Args:
        beta: concentration; above 0. Small: few clients have almost everything.

    Returns:
        Row numbers of each client, int64, ascending.
    """
    least = int(rows >= clients)
    shares = seeded_generator("niid_quantity sizes", seed).dirichlet(np.full(clients, beta))
    sizes = least + _whole(shares * (rows - least * clients), rows - least * clients)
    order = seeded_permutation(rows, "niid_quantity rows", seed)
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def _check_clients(clients: int, rows: int) -> None:
    if not 1 <= clients <= rows:
        raise ConfigError(f"--clients {clients}: allowed are 1 to {rows}, the number of rows")


def _proportions(concentration: np.ndarray, seed: int, client: int) -> np.ndarray:
    """One draw of a Dirichlet distribution; a label that is absent (concentration 0) has no share."""
    present = concentration > 0
    drawn = np.zeros(len(concentration))
    drawn[present] = seeded_generator("niid_label shares", seed, client).dirichlet(concentration[present])
    return drawn


def _take(wanted: np.ndarray, left: np.ndarray, length: int) -> np.ndarray:
    """``length`` rows as near to ``wanted`` as ``left`` allows; gaps are filled in proportion to what is left."""
    taken: np.ndarray = np.minimum(_whole(wanted, length), left)
    while (missing := length - taken.sum()) > 0:
        rest = left - taken
        taken = taken + np.minimum(_whole(rest / rest.sum() * missing, missing), rest)
    return taken


def _whole(amounts: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers near ``amounts`` that sum to ``total``: the largest remainders are rounded up."""
    floors: np.ndarray = np.floor(amounts).astype(np.int64)
    order = np.argsort(floors - amounts, kind="stable")
    floors[order[: total - floors.sum()]] += 1
    return floors
