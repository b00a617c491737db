"""Who holds which rows: four ways to divide a data set over clients, and the division of a client's rows.

Every splitter is a pure function from category codes (or a number of rows), a number of clients and a seed to one array
of row indices per client. The arrays are disjoint and together hold every row.

===========  ====================================================================================================
``iid``      rows dealt at random, sizes equal to within one
``lda``      each category divided by proportions drawn from Dirichlet(alpha) (Hsu et al., arXiv:1909.06335):
             small alpha, skewed clients
``meta``     whole categories given to clients
``natural``  rows grouped by a field that names their owner
===========  ====================================================================================================

Edge cases have outcomes, not loops or crashes. More clients than rows: some clients are empty (a log line counts them).
``lda`` draws anew up to ten times until nobody is empty, then moves rows from the largest clients to the empty ones.
Fewer categories than clients: several clients share a category evenly. More: categories are merged, the largest dealt
first.
"""

from __future__ import annotations

import logging
import math
from fractions import Fraction

import numpy as np

from fs_fwdllm.core.seeding import seeded_generator, seeded_permutation
from fs_fwdllm.errors import ConfigError

__all__ = ["divide_shares", "divide_stratified", "split_iid", "split_lda", "split_meta", "split_natural"]

logger = logging.getLogger("fs_fwdllm.data")

_LDA_DRAWS = 10


def split_iid(rows: int, client_num: int, seed: int) -> list[np.ndarray]:
    """Deal ``rows`` rows to ``client_num`` clients at random; int64 indices per client, ascending."""
    _log_empty(parts := _sorted_parts(np.array_split(seeded_permutation(rows, "iid", seed), client_num)))
    return parts


def split_lda(codes: np.ndarray, client_num: int, alpha: float, seed: int) -> list[np.ndarray]:
    """Divide every category by its own draw of Dirichlet(alpha) proportions.

    Args:
        codes: category of each row, int64 ``[rows]``.
        alpha: concentration; above 0.

    Returns:
        int64 indices per client, ascending; nobody is empty if there are as many rows as clients.
    """
    for draw in range(_LDA_DRAWS):
        parts = _draw_lda(codes, client_num, alpha, seed, draw)
        if min(len(part) for part in parts) > 0:
            break
    else:
        parts = _give_to_empty(parts)
    _log_empty(parts)
    return _sorted_parts(parts)


def split_meta(codes: np.ndarray, client_num: int, seed: int) -> list[np.ndarray]:
    """Give whole categories to clients, the largest first and in turn; few categories are shared by several clients.

    Args:
        codes: category of each row, int64 ``[rows]``.

    Returns:
        int64 indices per client, ascending.
    """
    groups = _groups_by_size(codes)
    if len(groups) >= client_num:
        return _merge(groups, client_num)
    logger.info("data.splitter meta: %d categories for %d clients: clients share categories", len(groups), client_num)
    parts: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * client_num
    for number, group in enumerate(groups):
        sharers = range(number, client_num, len(groups))
        order = group[seeded_permutation(len(group), "meta", seed, number)]
        for client, part in zip(sharers, np.array_split(order, len(sharers)), strict=True):
            parts[client] = part
    _log_empty(parts)
    return _sorted_parts(parts)


def split_natural(codes: np.ndarray, client_num: int) -> list[np.ndarray]:
    """One client per owner, in the order of the codes; with fewer clients than owners, owners are merged.

    Args:
        codes: owner of each row, int64 ``[rows]``.
        client_num: number of clients; 0 takes the number of owners.

    Raises:
        ConfigError: more clients than owners.
    """
    owners = np.unique(codes)
    if client_num > len(owners):
        raise ConfigError(
            f"federate.client_num: {client_num} is more than the {len(owners)} clients the data has by nature "
            f"(data.splitter natural); allowed are 0 (all of them) to {len(owners)}"
        )
    if client_num in (0, len(owners)):
        return [np.flatnonzero(codes == owner) for owner in owners]
    logger.info("data.splitter natural: %d owners are merged to %d clients", len(owners), client_num)
    return _merge(_groups_by_size(codes), client_num)


def divide_shares(
    parts: list[np.ndarray], shares: tuple[float, float, float], seed: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Divide each client's rows in train, validation and test at random.

    Over all clients together a share is met to within one row, however few rows a single client has, and a share above
    zero is never rounded to nothing; what a client cannot give, the next gives. No client loses its last training row.
    Test rows are drawn first: they do not depend on how many rows validation takes, so that who chooses on validation
    rows held out from training has not seen a test row.

    Args:
        parts: row indices per client.
        shares: of train, validation and test, not negative; their sum counts as the whole.

    Raises:
        ConfigError: the training share is 0.
    """
    exact = [Fraction(repr(float(share))) for share in shares]
    if exact[0] == 0:
        raise ConfigError(f"data.splits: {list(shares)} leaves nothing to train on; the first share must be above 0")
    whole = sum(exact)
    seen = given_val = given_test = 0
    divided = []
    for client, part in enumerate(parts):
        seen += len(part)
        spare = max(len(part) - 1, 0)
        test = min(math.ceil(exact[2] / whole * seen) - given_test, spare)
        val = min(math.ceil(exact[1] / whole * seen) - given_val, spare - test)
        given_val, given_test = given_val + val, given_test + test
        order = part[seeded_permutation(len(part), "train, val, test", seed, client)]
        divided.append((np.sort(order[test + val :]), np.sort(order[test : test + val]), np.sort(order[:test])))
    return divided


def divide_stratified(
    parts: list[np.ndarray], classes: np.ndarray, shares: tuple[float, float, float], seed: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Divide the rows of all clients in train, validation and test class by class.

    Over all clients together every class has its share of each split to within one row; a share above zero is at least
    one row, as long as one is left to train on. (scikit-learn's stratified splits refuse a class of one row, and fewer
    test rows than classes.) A client with few rows may keep none to train on.

    Args:
        parts: row indices per client.
        classes: class of each row, int64 ``[rows]``.
        shares: as for :func:`divide_shares`.

    Raises:
        ConfigError: the training share is 0.
    """
    if shares[0] == 0:
        raise ConfigError(f"data.splits: {list(shares)} leaves nothing to train on; the first share must be above 0")
    split_of = np.zeros(len(classes), dtype=np.int64)
    whole = sum(shares)
    held = np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)
    for code in np.unique(classes).tolist():
        group = held[classes[held] == code]
        order = group[seeded_permutation(len(group), "stratified", seed, code)]
        taken = 0
        for split, share in ((2, shares[2]), (1, shares[1])):
            wanted = max(1, round(share / whole * len(group))) if share else 0
            count = min(wanted, max(len(group) - 1 - taken, 0))
            split_of[order[taken : taken + count]] = split
            taken += count
    ordered = [np.sort(part) for part in parts]
    return [(part[split_of[part] == 0], part[split_of[part] == 1], part[split_of[part] == 2]) for part in ordered]


def _draw_lda(codes: np.ndarray, client_num: int, alpha: float, seed: int, draw: int) -> list[np.ndarray]:
    pieces: list[list[np.ndarray]] = [[] for _ in range(client_num)]
    for code in np.unique(codes).tolist():
        group = np.flatnonzero(codes == code)
        order = group[seeded_permutation(len(group), "lda rows", seed, draw, code)]
        proportions = seeded_generator("lda proportions", seed, draw, code).dirichlet(np.full(client_num, alpha))
        cuts = np.floor(np.cumsum(proportions)[:-1] * len(group)).astype(np.int64)
        for client, piece in enumerate(np.split(order, np.minimum(cuts, len(group)))):
            pieces[client].append(piece)
    return [np.concatenate(own) for own in pieces]


def _give_to_empty(parts: list[np.ndarray]) -> list[np.ndarray]:
    parts = list(parts)
    for client in [number for number, part in enumerate(parts) if len(part) == 0]:
        largest = max(range(len(parts)), key=lambda number: (len(parts[number]), -number))
        if len(parts[largest]) < 2:
            break
        parts[largest], parts[client] = parts[largest][:-1], parts[largest][-1:]
    return parts


def _groups_by_size(codes: np.ndarray) -> list[np.ndarray]:
    groups = [np.flatnonzero(codes == code) for code in np.unique(codes)]
    return sorted(groups, key=len, reverse=True)  # stable: equal sizes stay in the order of their codes


def _merge(groups: list[np.ndarray], client_num: int) -> list[np.ndarray]:
    return _sorted_parts([np.concatenate(groups[client::client_num]) for client in range(client_num)])


def _sorted_parts(parts: list[np.ndarray]) -> list[np.ndarray]:
    return [np.sort(part) for part in parts]


def _log_empty(parts: list[np.ndarray]) -> None:
    empty = sum(len(part) == 0 for part in parts)
    if empty:
        logger.warning("%d of %d clients hold no row", empty, len(parts))
