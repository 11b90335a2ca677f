"""k-NN against a naive fp64 loop."""

import math

import pytest
import torch

from harmonize.functional.knn import knn_votes, topk_accuracy


def clusters(num_train=90, num_test=30, num_classes=4, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, width, generator=generator)
    labels = torch.randint(num_classes, (num_train + num_test,), generator=generator)
    features = centres[labels] + torch.randn(num_train + num_test, width, generator=generator)
    return features[:num_train], labels[:num_train], features[num_train:], labels[num_train:]


def naive_votes(train, labels, queries, num_classes, k, temperature):
    """Loops over Python floats, straight from the definition."""
    rows = []
    for query in queries.double().tolist():
        similarity = []
        for vector in train.double().tolist():
            dot = sum(a * b for a, b in zip(query, vector, strict=True))
            similarity.append(dot / math.hypot(*query) / math.hypot(*vector))
        nearest = sorted(range(len(similarity)), key=lambda i: -similarity[i])[:k]
        votes = [0.0] * num_classes
        for i in nearest:
            votes[labels[i]] += math.exp(similarity[i] / temperature) / math.exp(similarity[nearest[0]] / temperature)
        rows.append(votes)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_a_naive_loop(temperature):
    train, labels, queries, _ = clusters()
    votes = knn_votes(train.double(), labels, queries.double(), 4, (1, 7, 20), temperature)
    assert list(votes) == [1, 7, 20]
    for k, actual in votes.items():
        torch.testing.assert_close(actual, naive_votes(train, labels, queries, 4, k, temperature))


def test_chunks_and_joint_k_change_nothing():
    train, labels, queries, _ = clusters()
    whole = knn_votes(train, labels, queries, 4, (5, 20))
    for k in (5, 20):
        torch.testing.assert_close(whole[k], knn_votes(train, labels, queries, 4, (k,), chunk_size=7)[k])


def test_more_neighbours_than_images():
    train, labels, queries, _ = clusters(num_train=8)
    torch.testing.assert_close(*[knn_votes(train, labels, queries, 4, (k,))[k] for k in (8, 100)])


def test_length_of_features_and_small_temperatures_do_no_harm():
    train, labels, queries, _ = clusters()
    votes = knn_votes(train, labels, queries, 4, (20,))[20]
    torch.testing.assert_close(knn_votes(train * 1e3, labels, queries * 1e-3, 4, (20,))[20], votes)
    cold = knn_votes(train, labels, queries, 4, (20,), temperature=1e-4)[20]
    assert cold.isfinite().all()
    assert cold.argmax(1).equal(knn_votes(train, labels, queries, 4, (1,))[1].argmax(1))


def test_topk_accuracy():
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    assert [topk_accuracy(scores, labels, k) for k in (1, 2, 3, 9)] == pytest.approx([1 / 3, 1 / 3, 1, 1])
