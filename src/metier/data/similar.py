"""Exact and near duplicates among texts, found without missing any.

Two texts are exact duplicates when they are equal once normalised (NFKC, lower case, no punctuation, single spaces).
They are near duplicates when the Jaccard index of their shingle sets is at least 0.8; shingles are three words in a
row, or four characters in scripts written without spaces. Short texts are mostly compared exactly: below one shingle
there is nothing else, one word put before or after a text counts as near from six words on, another last word from
eleven, and another word in the middle from 29.

Candidates come from prefix filtering: with shingles ordered from rare to common, two sets of Jaccard index t share one
among the first |x| - ceil(t |x|) + 1 of each. It is exact, so there is no probability of a miss as with MinHash; every
candidate is then verified. A shingle that stands in more than half of the texts, or in more than 2,000, is a template
(an instruction before every question) and is left out of the sets.

Source: shingles and their Jaccard index, Broder 1997, doi:10.1109/SEQUEN.1997.666900; prefix filtering, Chaudhuri et
al. 2006, doi:10.1109/ICDE.2006.9, and Bayardo et al. 2007, doi:10.1145/1242572.1242591; 0.8 and word 3-grams lie in
the range of Lee et al. 2022, arXiv:2107.06499 (0.8 with 5-grams on documents), shortened for one-sentence rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from metier.data.content import is_unspaced, normalised

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORDS, CHARACTERS = 3, 4
"""Units of a shingle; the threshold 4/5 below is kept in integers so that the edge is exact."""
NEAR = 0.8
TEMPLATE_LEAST, TEMPLATE_MOST = 20, 2000
PRODUCTS_AT_ONCE = 1_000_000
"""Bounds memory: steps of one sparse product, and elements of the sets verified together."""

# Shapes: N texts, U units (words or characters) of all texts, S shingles of all texts, P candidate pairs.


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that are the same or nearly so.

    Attributes:
        left: Index of the first.
        right: Index of the second.
        likeness: Jaccard index; 1 for exact duplicates.
        exact: Whether they are equal once normalised.
    """

    left: int
    right: int
    likeness: float
    exact: bool


def pairs_between(left: Sequence[str], right: Sequence[str]) -> list[Pair]:
    """Every text of `left` that stands in `right`, with one partner: an exact one if there is, else the nearest."""
    keys = [normalised(text) for text in (*left, *right)]
    places = {key: index for index, key in reversed(list(enumerate(keys[len(left) :])))}
    found = {i: Pair(i, places[key], 1.0, exact=True) for i, key in enumerate(keys[: len(left)]) if key in places}
    nearest: dict[str, tuple[float, int]] = {}
    for i, j, likeness in _near(keys, len(left)):
        if likeness > nearest.get(keys[i], (0.0, 0))[0]:
            nearest[keys[i]] = likeness, j - len(left)
    for i, key in enumerate(keys[: len(left)]):
        if i not in found and key in nearest:
            found[i] = Pair(i, nearest[key][1], nearest[key][0], exact=False)
    return [found[i] for i in sorted(found)]


def clusters(texts: Sequence[str]) -> list[int]:
    """For each text the smallest index of its cluster: exact and near duplicates, and theirs, share one."""
    keys = [normalised(text) for text in texts]
    first: dict[str, int] = {}
    parent = [first.setdefault(key, index) for index, key in enumerate(keys)]
    for i, j, _ in _near(keys, None):
        join(parent, i, j)
    return [root(parent, index) for index in range(len(parent))]


def root(parent: list[int], index: int) -> int:
    """The smallest member of the set that `index` belongs to; paths are halved on the way."""
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


def join(parent: list[int], one: int, other: int) -> None:
    """Make one set of two; the smaller index stays its root."""
    low, high = sorted((root(parent, one), root(parent, other)))
    parent[high] = low


def _near(keys: Sequence[str], cut: int | None) -> Iterator[tuple[int, int, float]]:
    """Pairs of near duplicates, (i, j, Jaccard): i < cut <= j, or any i < j where there is no cut.

    Equal texts are compared once, by the first of them on each side.
    """
    seen: dict[tuple[bool, str], int] = {}
    for index, key in enumerate(keys):
        seen.setdefault((cut is not None and index >= cut, key), index)
    of_N = np.fromiter(seen.values(), np.int64, len(seen))
    sets = _Sets.of([key for _, key in seen])
    if sets is None:
        return
    middle = len(of_N) if cut is None else int(np.searchsorted(of_N, cut))
    for i_P, j_P in sets.candidates(middle, 0 if cut is None else middle):
        for i, j, likeness in sets.verified(i_P, j_P):
            yield int(of_N[i]), int(of_N[j]), likeness


@dataclass(frozen=True, slots=True)
class _Sets:
    """Shingle sets as sparse 0-1 matrices, texts by shingles.

    Attributes:
        whole: Every shingle that is no template.
        prefix: The rarest of each text, as many as prefix filtering needs.
        sizes: Shingles of each text.
    """

    whole: Any
    prefix: Any
    sizes: NDArray[np.int64]

    @classmethod
    def of(cls, keys: Sequence[str]) -> _Sets | None:
        """The sets of normalised texts; None where no text is long enough."""
        row_S, hash_S = _shingles(keys)
        distinct, column_S = np.unique(hash_S, return_inverse=True)
        if not len(distinct):
            return None
        width = len(distinct)
        row_S, column_S = np.divmod(np.unique(row_S * width + column_S), width)
        frequency = np.bincount(column_S, minlength=width)
        kept_S = frequency[column_S] <= min(max(TEMPLATE_LEAST, len(keys) // 2), TEMPLATE_MOST)
        rank = np.empty(width, np.int64)
        rank[np.argsort(frequency, kind="stable")] = np.arange(width)
        row_S, rank_S = np.divmod(np.sort(row_S[kept_S] * width + rank[column_S[kept_S]]), width)
        size_N = np.bincount(row_S, minlength=len(keys))
        position_S = np.arange(len(row_S)) - (np.cumsum(size_N) - size_N)[row_S]
        prefix_N = size_N - (4 * size_N + 4) // 5 + 1
        early_S = position_S < prefix_N[row_S]
        shape = (len(keys), width)
        return cls(_matrix(row_S, rank_S, shape), _matrix(row_S[early_S], rank_S[early_S], shape), size_N)

    def candidates(self, end: int, start: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs (i < end, j >= start, i < j) whose prefixes meet and whose sizes allow the threshold, in blocks."""
        right = self.prefix[start:].T.tocsr()
        steps = np.cumsum(self.prefix[:end] @ np.diff(right.indptr))
        for low, high in pairwise([0, *_cuts(steps), end]):
            met = (self.prefix[low:high] @ right).tocoo()
            i_P, j_P = met.row.astype(np.int64) + low, met.col.astype(np.int64) + start
            less, more = np.minimum(self.sizes[i_P], self.sizes[j_P]), np.maximum(self.sizes[i_P], self.sizes[j_P])
            kept_P = (i_P < j_P) & (5 * less >= 4 * more)
            yield i_P[kept_P], j_P[kept_P]

    def verified(self, i_P: NDArray[np.int64], j_P: NDArray[np.int64]) -> Iterator[tuple[int, int, float]]:
        """Those pairs whose Jaccard index is at least 4/5, with it."""
        cuts = _cuts(np.cumsum(self.sizes[i_P]))
        for i_p, j_p in zip(np.split(i_P, cuts), np.split(j_P, cuts), strict=True):
            common = np.asarray(self.whole[i_p].multiply(self.whole[j_p]).sum(axis=1)).ravel().astype(np.int64)
            union = self.sizes[i_p] + self.sizes[j_p] - common
            for place in np.flatnonzero((5 * common >= 4 * union) & (common > 0)):
                yield int(i_p[place]), int(j_p[place]), float(common[place] / union[place])


def _cuts(work: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where to cut so that each part adds about `PRODUCTS_AT_ONCE` to the running total `work`."""
    return np.flatnonzero(np.diff(work // PRODUCTS_AT_ONCE)) + 1


def _matrix(row_S: NDArray[np.int64], column_S: NDArray[np.int64], shape: tuple[int, int]) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix((np.ones(len(row_S), np.int32), (row_S, column_S)), shape=shape)


def _shingles(keys: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Text index and 64-bit hash of every shingle."""
    vocabulary: dict[str, int] = {}
    words: list[tuple[int, Sequence[int]]] = []
    characters: list[tuple[int, Sequence[int]]] = []
    for index, key in enumerate(keys):
        if is_unspaced(key):
            characters.append((index, [ord(character) for character in key if character != " "]))
        else:
            words.append((index, [vocabulary.setdefault(word, len(vocabulary)) for word in key.split()]))
    parts = [_hashed(words, WORDS), _hashed(characters, CHARACTERS)]
    return np.concatenate([row for row, _ in parts]), np.concatenate([hashes for _, hashes in parts])


def _hashed(units: Sequence[tuple[int, Sequence[int]]], n: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Every run of n units within one text, hashed by multiplication and shift (64 bits)."""
    lengths = [len(of_text) for _, of_text in units]
    unit_U = np.fromiter((unit for _, of_text in units for unit in of_text), np.uint64, sum(lengths))
    row_U = np.repeat(np.fromiter((index for index, _ in units), np.int64, len(units)), lengths)
    runs = max(0, len(unit_U) - n + 1)
    hash_U = np.full(runs, n, np.uint64)
    for step in range(n):
        hash_U = (hash_U ^ unit_U[step : step + runs]) * np.uint64(0x9E3779B97F4A7C15)
        hash_U ^= hash_U >> np.uint64(29)
    inside_U = row_U[:runs] == row_U[n - 1 : n - 1 + runs]
    return row_U[:runs][inside_U], hash_U[inside_U]
