"""k-NN against a naive fp64 loop, and against itself under other tiles."""

import math

import pytest
import torch

from harmonize.functional.knn import (
    knn_correct,
    knn_votes,
    nearest_neighbours,
    neighbour_votes,
    tile_shape,
    topk_accuracy,
    topk_correct,
)

TINY = (1, 2_000, 20_000)  # bytes: one query and k columns at a time, and two others


def clusters(num_train=90, num_test=30, num_classes=4, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=generator)
    labels = torch.randint(num_classes, (num_train + num_test,), generator=generator)
    features = centres[labels] + torch.randn(num_train + num_test, width, generator=generator)
    return features[:num_train], labels[:num_train], features[num_train:], labels[num_train:]


def naive_neighbours(train, queries, k):
    """Loops over Python floats, straight from the definition: per query (similarity, position) of the nearest."""
    rows = []
    for query in queries.double().tolist():
        similarity = []
        for vector in train.double().tolist():
            dot = sum(a * b for a, b in zip(query, vector, strict=True))
            similarity.append(dot / math.hypot(*query) / math.hypot(*vector))
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]  # stable
        rows.append([(similarity[i], i) for i in nearest])
    return rows


def naive_votes(train, labels, queries, num_classes, k, temperature):
    rows = []
    for nearest in naive_neighbours(train, queries, k):
        votes = [0.0] * num_classes
        for similarity, i in nearest:
            votes[labels[i]] += math.exp(similarity / temperature) / math.exp(nearest[0][0] / temperature)
        rows.append(votes)
    return torch.tensor(rows, dtype=torch.float64)


def lattice(num, seed=0):
    """Vectors whose similarities are exact in floating point and take five values: nearly all are ties."""
    signs = torch.randint(2, (num, 4), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs * 0.5


def neighbours(*arguments):
    return [torch.cat(parts) for parts in zip(*nearest_neighbours(*arguments), strict=True)]


def test_equals_a_naive_loop():
    train, labels, queries, _ = clusters()
    ks, temperatures = (20, 1, 7), (0.07, 1.0)
    votes = knn_votes(train.double(), labels, queries.double(), 4, ks, temperatures)
    assert list(votes) == [(k, temperature) for k in ks for temperature in temperatures]
    for (k, temperature), actual in votes.items():
        torch.testing.assert_close(actual, naive_votes(train, labels, queries, 4, k, temperature))


@pytest.mark.parametrize("max_bytes", TINY)
def test_tiles_and_joint_settings_change_nothing(max_bytes):
    train, labels, queries, _ = (x.double() if x.is_floating_point() else x for x in clusters())
    whole = knn_votes(train, labels, queries, 4, (5, 20), (0.07, 0.2))
    for (k, temperature), votes in whole.items():
        part = knn_votes(train, labels, queries, 4, (k,), (temperature,), max_bytes)
        torch.testing.assert_close(part[k, temperature], votes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 40, 99, 100])
def test_ties_go_to_the_first_in_the_bank_whatever_the_tiles(dtype, k):
    train, queries = lattice(100).to(dtype), lattice(37, seed=1).to(dtype)
    expected = naive_neighbours(train, queries, k)
    for max_bytes in (2**28, *TINY):
        similarity, position = neighbours(train, queries, k, max_bytes)
        assert position.tolist() == [[i for _, i in row] for row in expected]
        assert similarity.tolist() == [[s for s, _ in row] for row in expected]


def test_a_collapsed_encoder_has_neighbours():
    _, position = neighbours(torch.ones(50, 3), torch.ones(20, 3), 7)
    assert position.tolist() == [list(range(7))] * 20


@pytest.mark.parametrize("max_bytes", [2**28, *TINY])
def test_more_neighbours_than_images(max_bytes):
    train, labels, queries, _ = clusters(num_train=8)
    votes = knn_votes(train, labels, queries, 4, (8, 9, 100), max_bytes=max_bytes)
    assert votes[8, 0.07].equal(votes[9, 0.07])
    assert votes[8, 0.07].equal(votes[100, 0.07])


@pytest.mark.parametrize("num", [0, 1, 2])
def test_any_number_of_queries(num):
    train, labels, queries, truth = clusters()
    whole = knn_votes(train, labels, queries, 4)[20, 0.07]
    torch.testing.assert_close(knn_votes(train, labels, queries[:num], 4)[20, 0.07], whole[:num])
    assert knn_correct(train, labels, queries[:num], truth[:num], 4)[20, 0.07].shape == (1, num)


def test_length_of_features_and_small_temperatures_do_no_harm():
    train, labels, queries, _ = clusters()
    votes = knn_votes(train, labels, queries, 4)[20, 0.07]
    torch.testing.assert_close(knn_votes(train * 1e3, labels, queries * 1e-3, 4)[20, 0.07], votes)
    cold = knn_votes(train, labels, queries, 4, temperatures=(1e-4,))[20, 1e-4]
    assert cold.isfinite().all()
    assert cold.argmax(1).equal(knn_votes(train, labels, queries, 4, (1,))[1, 0.07].argmax(1))


@pytest.mark.parametrize("max_bytes", [2**28, 2_000])
def test_correct_is_that_of_the_votes(max_bytes):
    train, labels, queries, truth = clusters(num_classes=6)
    ks, temperatures = (1, 20), (0.07, 1.0)
    correct = knn_correct(train, labels, queries, truth, 6, ks, temperatures, (1, 2), max_bytes)
    votes = knn_votes(train, labels, queries, 6, ks, temperatures)
    assert list(correct) == list(votes)
    for setting, scores in votes.items():
        for row, top in zip(correct[setting], (1, 2), strict=True):
            assert row.equal(topk_correct(scores, truth, top))


@pytest.mark.parametrize("num_bank", [10, 1_000, 50_000, 1_281_167])
@pytest.mark.parametrize("num_queries", [1, 300, 50_000])
@pytest.mark.parametrize("max_bytes", [2**22, 2**28])
def test_tiles_keep_the_bound(num_queries, num_bank, max_bytes):
    k = min(200, num_bank)
    rows, columns = tile_shape(num_queries, num_bank, k, 4, max_bytes)
    assert rows * (4 * columns + 64 * k) <= max_bytes
    assert k <= columns <= num_bank
    assert 1 <= rows <= num_queries
    if columns < num_bank:  # a part of the bank only where the whole would leave too few queries
        assert rows <= 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (0,)}, "k="),
        ({"k": ()}, "k="),
        ({"temperatures": (0.07, 0.0)}, "temperatures="),
        ({"temperatures": ()}, "temperatures="),
        ({"bank": torch.zeros(0, 2)}, "at least one"),
        ({"bank": torch.tensor([[1.0, math.nan]])}, "finite"),
        ({"queries": torch.tensor([[1.0, math.inf]])}, "finite"),
    ],
)
def test_impossible_questions_are_named(options, message):
    setting = {"bank": torch.ones(1, 2), "queries": torch.ones(1, 2), "k": (1,), "temperatures": (0.07,)} | options
    with pytest.raises(ValueError, match=message):
        knn_votes(
            setting["bank"],
            torch.zeros(len(setting["bank"]), dtype=torch.int64),
            setting["queries"],
            2,
            setting["k"],
            setting["temperatures"],
        )


def test_neighbours_of_k_below_one_are_refused():
    with pytest.raises(ValueError, match="k=0"):
        next(nearest_neighbours(torch.ones(1, 2), torch.ones(1, 2), 0))
    with pytest.raises(ValueError, match="k="):
        neighbour_votes(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64), 2, (0,), (0.07,))


def test_topk_accuracy():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    assert [topk_accuracy(scores, labels, k) for k in (1, 2, 3, 9)] == pytest.approx([1 / 3, 1 / 3, 1, 1])


def test_topk_correct_is_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(3, (200, 6), generator=generator).double()
    labels = torch.randint(6, (200,), generator=generator)
    for k in range(1, 8):
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
        assert topk_correct(scores, labels, k).equal((best == labels[:, None]).any(1))


def test_scores_that_are_not_numbers_are_not_right():
    assert not topk_correct(torch.full((2, 4), math.nan), torch.tensor([0, 3]), 3).any()
