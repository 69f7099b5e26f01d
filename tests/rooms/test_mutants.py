"""A few hundred of the mutants that `make fuzz` reads by the hundred thousand."""

import collections
import random

import mutants
import pytest

FEWEST = {"h5ad": 20}
"""Each is looked through by a process of its own, which takes a quarter of a second to begin."""
FOUND_BEFORE: dict[str, tuple[int, ...]] = {"h5ad": (25, 968, 1826, 2812)}
"""Numbers of mutants that were once not caught: 25 sends the HDF5 library round in a circle."""


@pytest.mark.parametrize("parser", mutants.PARSERS, ids=lambda parser: parser.name)
@pytest.mark.filterwarnings("ignore")
def test_mutants_end_in_a_value_or_in_one_of_our_errors(tmp_path, parser):
    ended = dict(mutants.outcomes(parser, range(FEWEST.get(parser.name, 400)), tmp_path))
    for number in FOUND_BEFORE.get(parser.name, ()):
        ended |= dict(mutants.outcomes(parser, range(number, number + 1), tmp_path))
    assert {number: said for number, said in ended.items() if said.startswith("not caught")} == {}
    assert len(collections.Counter(ended.values())) >= 2  # some are read, some refused


class Unchanging(random.Random):
    """Dice that never fall on a change."""

    def random(self):
        return 0.5


@pytest.mark.parametrize("parser", mutants.PARSERS, ids=lambda parser: parser.name)
@pytest.mark.filterwarnings("ignore")
def test_what_the_mutants_are_made_of_is_honest(tmp_path, parser):
    path = tmp_path / f"honest{parser.suffix}"
    for seed in parser.seeds():
        path.write_bytes(parser.dress(seed, Unchanging()))
        parser.read(path)
