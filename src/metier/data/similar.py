"""Exact and near duplicates among texts, found without missing any.

Two texts are exact duplicates when they are equal once normalised (NFKC, lower case, no punctuation, single spaces).
They are near duplicates when the Jaccard index of their shingle sets is at least 0.8; shingles are three words in a
row, or four characters in scripts written without spaces. Short texts are mostly compared exactly: below one shingle
there is nothing else, one word put before or after a text counts as near from six words on, another last word from
eleven, and another word in the middle from 29.

Candidates come from prefix filtering: with shingles ordered from rare to common, two sets of Jaccard index t share one
among the first |x| - ceil(t |x|) + 1 of each, and behind the first shared one there are enough of both. It is exact, so
there is no probability of a miss as with MinHash; every candidate is then verified. A shingle that stands in more than
half of the texts, or in more than 2,000, is a template (an instruction before every question) and is left out of the
sets.

Shingles stand on disk where they are many and are read in blocks; of a text itself a digest and a few numbers are held.

Source: shingles and their Jaccard index, Broder 1997, doi:10.1109/SEQUEN.1997.666900; prefix filtering, Chaudhuri et
al. 2006, doi:10.1109/ICDE.2006.9, and Bayardo et al. 2007, doi:10.1145/1242572.1242591; by place in it, Xiao et al.
2008, doi:10.1145/1367497.1367516; 0.8 and word 3-grams lie in the range of Lee et al. 2022, arXiv:2107.06499 (0.8 with
5-grams on documents), shortened for one-sentence rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from metier.data.content import digest, is_unspaced, normalised
from metier.data.disk import Column, Writer

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORDS, CHARACTERS = 3, 4
"""Units of a shingle; the threshold 4/5 below is kept in integers so that the edge is exact."""
NEAR = 0.8
TEMPLATE_LEAST, TEMPLATE_MOST = 20, 2000
PRODUCTS_AT_ONCE = 250_000
"""Bounds memory: steps of one sparse product, and elements of the sets that are read together."""
PAIRS_AT_ONCE = 1 << 20
"""Candidates that are set beside all earlier ones together."""
CHARACTERS_AT_ONCE = 500_000
"""Bounds memory: characters of the texts that are cut into shingles together."""
MOST_BUCKETS = 22
"""Frequencies are counted in at most 2 to this power buckets, 16 MB."""
PARTS = 32
"""Prefixes are compared in so many parts, of which one is in memory."""
PREFIX = np.dtype([("hash", np.uint64), ("row", np.int32), ("after", np.int32)])
"""A shingle among the rarest of its text, that text, and how many shingles of it stand from this one on."""

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


def pairs_between(left: Iterable[str], right: Iterable[str]) -> list[Pair]:
    """Every text of `left` that stands in `right`, with one partner: an exact one if there is, else the nearest."""
    texts = _Texts()
    middle = texts.read(left)
    texts.read(right)
    keys = texts.keys()
    known, first = np.unique(keys[middle:], return_index=True)
    found: dict[int, Pair] = {}
    if len(known):
        at = np.minimum(np.searchsorted(known, keys[:middle]), len(known) - 1)
        same = np.flatnonzero(known[at] == keys[:middle])
        found = {int(i): Pair(int(i), int(first[at[i]]), 1.0, exact=True) for i in same}
    nearest: dict[int, tuple[float, int]] = {}
    for i, j, likeness in _near(texts, middle):
        best, partner = nearest.get(int(keys[i]), (0.0, j))
        if (likeness, partner) > (best, j):
            nearest[int(keys[i])] = likeness, j
    wanted = np.fromiter(nearest, np.uint64, len(nearest))
    for i in np.flatnonzero(np.isin(keys[:middle], wanted)).tolist():
        likeness, j = nearest[int(keys[i])]
        found.setdefault(i, Pair(i, j - middle, likeness, exact=False))
    return [found[i] for i in sorted(found)]


def clusters(texts: Iterable[str]) -> array[int]:
    """For each text the smallest index of its cluster: exact and near duplicates, and theirs, share one."""
    found = _Texts()
    found.read(texts)
    _, first, which = np.unique(found.keys(), return_index=True, return_inverse=True)
    parent = array("q", first[which].astype(np.int64).tobytes())
    for i, j, _ in _near(found, None):
        join(parent, i, j)
    return array("q", (root(parent, index) for index in range(len(parent))))


def root(parent: MutableSequence[int], index: int) -> int:
    """The smallest member of the set that `index` belongs to; paths are halved on the way."""
    while parent[index] != index:
        parent[index] = parent[parent[index]]
        index = parent[index]
    return index


def join(parent: MutableSequence[int], one: int, other: int) -> None:
    """Make one set of two; the smaller index stays its root."""
    low, high = sorted((root(parent, one), root(parent, other)))
    parent[high] = low


class _Texts:
    """Texts as their digests and their shingles, which may be many and then stand on disk."""

    def __init__(self) -> None:
        self._keys = array("Q")
        self._ends = array("q")
        self._shingles = Writer(np.uint64)

    def read(self, texts: Iterable[str]) -> int:
        """Add texts; how many there are now."""
        some: list[str] = []
        characters = 0
        for text in texts:
            key = normalised(text)
            self._keys.append(digest(key))
            some.append(key)
            characters += len(key)
            if characters > CHARACTERS_AT_ONCE:
                self._add(some)
                some, characters = [], 0
        self._add(some)
        return len(self._keys)

    def keys(self) -> NDArray[np.uint64]:
        """The digest of each normalised text."""
        return np.array(self._keys, np.uint64)

    def ends(self) -> NDArray[np.int64]:
        """Where the shingles of each text end."""
        return np.array(self._ends, np.int64)

    def shingles(self) -> Column:
        """The shingles of each text, each once and in order; nothing can be added any more."""
        return self._shingles.done()

    def _add(self, keys: Sequence[str]) -> None:
        row_S, hash_S = _shingles(keys)
        order = np.lexsort((hash_S, row_S))
        row_S, hash_S = row_S[order], hash_S[order]
        if len(row_S):
            new_S = np.append(True, (np.diff(row_S) != 0) | (hash_S[1:] != hash_S[:-1]))
            row_S, hash_S = row_S[new_S], hash_S[new_S]
        before = len(self._shingles)
        self._shingles.add(hash_S)
        self._ends.extend((before + np.cumsum(np.bincount(row_S, minlength=len(keys)))).tolist())


def _near(texts: _Texts, cut: int | None) -> Iterator[tuple[int, int, float]]:
    """Pairs of near duplicates, (i, j, Jaccard): i < cut <= j, or any i < j where there is no cut.

    Equal texts are compared once, by the first of them on each side.
    """
    keys = texts.keys()
    sides = [(0, len(keys))] if cut is None else [(0, cut), (cut, len(keys))]
    of_N = np.concatenate([start + np.sort(np.unique(keys[start:stop], return_index=True)[1]) for start, stop in sides])
    middle = len(of_N) if cut is None else int(np.searchsorted(of_N, cut))
    sets = _Sets(texts, of_N)
    for i, j, likeness in sets.pairs(middle, 0 if cut is None else middle):
        yield int(of_N[i]), int(of_N[j]), likeness


class _Sets:
    """Shingle sets of N texts, read in blocks; templates are left out of them."""

    def __init__(self, texts: _Texts, of_N: NDArray[np.int64]) -> None:
        ends = texts.ends()
        self._column = texts.shingles()
        self._end_N = ends[of_N]
        self._start_N = np.where(of_N > 0, ends[of_N - 1], 0)
        self._size_N = self._end_N - self._start_N
        self._templates = np.empty(0, np.uint64)
        # Frequencies are counted in buckets: a bucket is no rarer than any shingle in it.
        self._mask = np.uint64((1 << min(MOST_BUCKETS, max(10, int(self._size_N.sum()).bit_length()))) - 1)
        self._bucket = np.zeros(int(self._mask) + 1, np.int32)
        for low, high in self._blocks():
            np.add.at(self._bucket, self._read(np.arange(low, high))[1] & self._mask, 1)
        self._templates = self._frequent(min(max(TEMPLATE_LEAST, len(of_N) // 2), TEMPLATE_MOST))

    def pairs(self, end: int, start: int) -> Iterator[tuple[int, int, float]]:
        """Pairs (i < end, j >= start, i < j) of near duplicates, each once."""
        many, seen = len(self._size_N), np.empty(0, np.int64)
        met = (i_P * many + j_P for part in self._prefixes() for i_P, j_P in self._meeting(part, end, start))
        for some in _together(met):
            new = np.setdiff1d(some, seen)
            seen = np.union1d(seen, new)
            yield from self._verified(*np.divmod(new, many))

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of texts with about so many shingles as are held at once."""
        return pairwise([0, *_cuts(np.cumsum(self._size_N)), len(self._size_N)])

    def _read(self, row_N: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Index and hash of every shingle of some texts, without templates."""
        parts = [self._column.read(*ends) for ends in zip(self._start_N[row_N], self._end_N[row_N], strict=True)]
        hash_S = np.concatenate([np.empty(0, np.uint64), *parts])
        row_S = np.repeat(row_N, self._end_N[row_N] - self._start_N[row_N])
        if not len(self._templates):
            return row_S, hash_S
        at_S = np.minimum(np.searchsorted(self._templates, hash_S), len(self._templates) - 1)
        kept_S = self._templates[at_S] != hash_S
        return row_S[kept_S], hash_S[kept_S]

    def _frequent(self, most: int) -> NDArray[np.uint64]:
        """Shingles that stand in more texts than `most`: those of full buckets are counted one by one."""
        hashes, counts = np.empty(0, np.uint64), np.empty(0, np.int64)
        for low, high in self._blocks():
            hash_S = self._read(np.arange(low, high))[1]
            here, often = np.unique(hash_S[self._bucket[hash_S & self._mask] > most], return_counts=True)
            hashes, place = np.unique(np.concatenate([hashes, here]), return_inverse=True)
            counts = np.bincount(place, np.concatenate([counts, often]), len(hashes)).astype(np.int64)
        return hashes[counts > most]

    def _prefixes(self) -> Iterator[NDArray[Any]]:
        """The rarest shingles of each text, as many as prefix filtering needs, in parts by hash.

        Any order of the shingles that all texts share will do; a shingle alone in its bucket meets no other.
        """
        parts = [Writer(PREFIX, in_memory=1 << 19) for _ in range(PARTS)]
        for low, high in self._blocks():
            row_S, hash_S = self._read(np.arange(low, high))
            often_S = self._bucket[hash_S & self._mask]
            order = np.lexsort((hash_S, often_S, row_S))
            row_S, hash_S, often_S = row_S[order], hash_S[order], often_S[order]
            size_N = np.bincount(row_S - low, minlength=high - low)
            self._size_N[low:high] = size_N
            position_S = np.arange(len(row_S)) - (np.cumsum(size_N) - size_N)[row_S - low]
            early_S = (position_S < (size_N - (4 * size_N + 4) // 5 + 1)[row_S - low]) & (often_S > 1)
            prefix_S = np.empty(int(early_S.sum()), PREFIX)
            prefix_S["hash"], prefix_S["row"] = hash_S[early_S], row_S[early_S]
            prefix_S["after"] = (size_N[row_S - low] - position_S)[early_S]
            for number, part in enumerate(parts):
                part.add(prefix_S[prefix_S["hash"] % PARTS == number])
        for part in parts:
            yield part.done().read(0, len(part))

    def _meeting(
        self, prefix_S: NDArray[Any], end: int, start: int
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Pairs that share one of these shingles and can still reach the threshold, in blocks.

        All that two texts share stands, in the order of the shingles, from the first shared one on: where too little
        does, this is not the first, or there are not enough.
        """
        if not len(prefix_S):
            return
        prefix_S = prefix_S[np.argsort(prefix_S["hash"], kind="stable")]  # texts stand in order already
        new_S = np.append(True, prefix_S["hash"][1:] != prefix_S["hash"][:-1])
        alone_S = new_S & np.append(new_S[1:], True)
        prefix_S, new_S = prefix_S[~alone_S], new_S[~alone_S]
        row_S, after_S, group_S = prefix_S["row"].astype(np.int64), prefix_S["after"], np.cumsum(new_S) - 1
        ends_G = np.append(np.flatnonzero(new_S)[1:], len(new_S))
        # Partners stand behind a shingle's own place, and behind those of its group that are no right side.
        right_G = np.bincount(group_S[row_S >= start], minlength=len(ends_G))
        first_S = np.maximum(np.arange(len(row_S)) + 1, (ends_G - right_G)[group_S])
        many_S = np.where(row_S < end, ends_G[group_S] - first_S, 0)
        for low, high in pairwise([0, *_cuts(np.cumsum(many_S)), len(row_S)]):
            many = many_S[low:high]
            left_P = np.repeat(np.arange(low, high), many)
            right_P = np.repeat(first_S[low:high] - np.cumsum(many) + many, many) + np.arange(len(left_P))
            i_P, j_P = row_S[left_P], row_S[right_P]
            shared_most_P = np.minimum(after_S[left_P], after_S[right_P])
            # Jaccard of at least 4/5 is 9 times what is shared against 4 times what both have.
            kept_P = 9 * shared_most_P >= 4 * (self._size_N[i_P] + self._size_N[j_P])
            yield i_P[kept_P], j_P[kept_P]

    def _verified(self, i_P: NDArray[np.int64], j_P: NDArray[np.int64]) -> Iterator[tuple[int, int, float]]:
        """Those pairs whose Jaccard index is at least 4/5, with it."""
        cuts = _cuts(np.cumsum(self._size_N[i_P] + self._size_N[j_P]))
        for i_p, j_p in zip(np.split(i_P, cuts), np.split(j_P, cuts), strict=True):
            rows, place = np.unique(np.concatenate([i_p, j_p]), return_inverse=True)
            row_S, hash_S = self._read(rows)
            distinct, column_S = np.unique(hash_S, return_inverse=True)
            whole = _matrix(np.searchsorted(rows, row_S), column_S, (len(rows), len(distinct)))
            left, right = whole[place[: len(i_p)]], whole[place[len(i_p) :]]
            common = np.asarray(left.multiply(right).sum(axis=1)).ravel().astype(np.int64)
            union = self._size_N[i_p] + self._size_N[j_p] - common
            for at in np.flatnonzero((5 * common >= 4 * union) & (common > 0)):
                yield int(i_p[at]), int(j_p[at]), float(common[at] / union[at])


def _cuts(work: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where to cut so that each part adds about `PRODUCTS_AT_ONCE` to the running total `work`."""
    return np.flatnonzero(np.diff(work // PRODUCTS_AT_ONCE)) + 1


def _together(parts: Iterable[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Arrays joined to ones of about `PAIRS_AT_ONCE`."""
    waiting: list[NDArray[np.int64]] = []
    count = 0
    for part in parts:
        waiting.append(part)
        count += len(part)
        if count > PAIRS_AT_ONCE:
            yield np.concatenate(waiting)
            waiting, count = [], 0
    if waiting:
        yield np.concatenate(waiting)


def _matrix(row_S: NDArray[np.int64], column_S: NDArray[np.int64], shape: tuple[int, int]) -> Any:
    from scipy.sparse import csr_matrix

    return csr_matrix((np.ones(len(row_S), np.int32), (row_S, column_S)), shape=shape)


def _shingles(keys: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Text index and 64-bit hash of every shingle."""
    words: list[tuple[int, Sequence[int]]] = []
    characters: list[tuple[int, Sequence[int]]] = []
    for index, key in enumerate(keys):
        if is_unspaced(key):
            characters.append((index, [ord(character) for character in key if character != " "]))
        else:
            words.append((index, [hash(word) for word in key.split()]))
    parts = [_hashed(words, WORDS), _hashed(characters, CHARACTERS)]
    return np.concatenate([row for row, _ in parts]), np.concatenate([hashes for _, hashes in parts])


def _hashed(units: Sequence[tuple[int, Sequence[int]]], n: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Every run of n units within one text, hashed by multiplication and shift (64 bits)."""
    lengths = [len(of_text) for _, of_text in units]
    unit_U = np.fromiter((unit for _, of_text in units for unit in of_text), np.int64, sum(lengths)).view(np.uint64)
    row_U = np.repeat(np.fromiter((index for index, _ in units), np.int64, len(units)), lengths)
    runs = max(0, len(unit_U) - n + 1)
    hash_U = np.full(runs, n, np.uint64)
    for step in range(n):
        hash_U = (hash_U ^ unit_U[step : step + runs]) * np.uint64(0x9E3779B97F4A7C15)
        hash_U ^= hash_U >> np.uint64(29)
    inside_U = row_U[:runs] == row_U[n - 1 : n - 1 + runs]
    return row_U[:runs][inside_U], hash_U[inside_U]
