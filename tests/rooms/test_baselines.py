"""The cheap ways: right on what they can see, and never better than they are."""

import numpy as np
import pytest

from metier.evaluation.baselines import frozen_linear, linear_words, nearest_class

TEXTS = ("the parcel is late", "the parcel never came", "refund my money", "the money was taken twice")
LABELS = ("delivery", "delivery", "billing", "billing")
DICE = np.random.default_rng(0)
MEANS = DICE.normal(size=(3, 16))


def clouds(each, spread):
    """Vectors around three means, and the number of the mean as their label."""
    kinds = np.repeat(np.arange(3), each)
    return MEANS[kinds] + spread * DICE.normal(size=(3 * each, 16)), [f"class {kind}" for kind in kinds]


def test_words_decide():
    assert linear_words(TEXTS, LABELS, ["where is my parcel", "give the money back"]) == ["delivery", "billing"]
    assert linear_words(["我的包裹没到", "包裹丢了", "请退款", "退款没到"], LABELS, ["包裹在哪", "要退款"]) == [
        "delivery",
        "billing",
    ]


def test_one_class_needs_no_model():
    assert linear_words(TEXTS, ["billing"] * 4, ["anything"]) == ["billing"]
    assert frozen_linear(np.ones((4, 2)), ["billing"] * 4, np.ones((1, 2))) == ["billing"]


@pytest.mark.parametrize("way", [nearest_class, frozen_linear])
def test_vectors_decide(way):
    train, labels = clouds(30, 0.3)
    test, wanted = clouds(20, 0.3)
    assert np.mean([a == b for a, b in zip(way(train, labels, test), wanted, strict=True)]) > 0.95
    noise = DICE.normal(size=(60, 16))
    assert np.mean([a == b for a, b in zip(way(train, labels, noise), wanted, strict=True)]) < 0.6


def test_the_nearest_class_is_the_one_of_the_mean_by_angle():
    train = np.array([[1.0, 0.0], [3.0, 0.2], [0.0, 1.0], [0.1, 2.0]])
    assert nearest_class(train, ["x", "x", "y", "y"], np.array([[0.1, 0.01], [5.0, 6.0]])) == ["x", "y"]
