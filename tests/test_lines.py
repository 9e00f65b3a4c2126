from __future__ import annotations

import numpy as np
import pytest
import torch

from filterpress import lines
from filterpress.lines import k_lines, match, standardise


def draw(n, d=9, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def planted(n, k, seed=0):
    """Draw ``n`` vectors ``a T + b`` of ``k`` lines; return lines, vectors and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = standardise(draw(k, seed=seed + 100))
    labels = torch.arange(n) % k
    factors, offsets = torch.randn(2, n, 1, generator=generator)
    return centres, factors * centres[labels] + offsets, labels


def test_vectors_become_mean_free_and_of_unit_norm_and_flat_ones_zero():
    vectors = torch.cat([draw(5), torch.full((1, 9), 0.1), torch.zeros(1, 9)])
    points = standardise(vectors)
    centred = vectors.numpy() - vectors.numpy().mean(axis=1, keepdims=True)
    expected = centred[:5] / np.linalg.norm(centred[:5], axis=1, keepdims=True)
    np.testing.assert_allclose(points[:5], expected, atol=1e-6)
    assert not points[5:].any()


def test_the_match_is_that_of_numpys_correlations(monkeypatch):
    monkeypatch.setattr(lines, "CHUNK", 7)
    vectors, others = draw(40), draw(6, seed=1)
    correlations = np.corrcoef(np.concatenate([vectors, others]))[:40, 40:]
    found = match(standardise(vectors), standardise(others))
    assert found.labels.tolist() == abs(correlations).argmax(axis=1).tolist()
    expected = np.take_along_axis(correlations, found.labels[:, None].numpy(), 1)[:, 0]
    np.testing.assert_allclose(found.correlations, expected, atol=1e-6)


def test_a_vector_and_its_negative_are_on_one_line():
    vectors, centres = draw(30), standardise(draw(5, seed=1))
    some, others = (match(standardise(sign * vectors), centres) for sign in (1, -1))
    assert some.labels.equal(others.labels)
    torch.testing.assert_close(some.correlations, -others.correlations)
    assert float(some.correlations.min()) < 0 < float(some.correlations.max())


@pytest.mark.parametrize("sample", [2**16, 300])
def test_planted_lines_are_found_again(sample, monkeypatch):
    monkeypatch.setattr(lines, "SAMPLE", sample)
    centres, vectors, labels = planted(600, 12)
    found = k_lines(vectors, 12)
    assert found.shape == (12, 9)
    agreement = (found @ centres.T).abs()
    torch.testing.assert_close(agreement.amax(dim=0), torch.ones(12), rtol=0, atol=1e-5)
    matches = match(standardise(vectors), found)
    assert len(set(zip(matches.labels.tolist(), labels.tolist(), strict=True))) == 12
    torch.testing.assert_close(matches.correlations.abs(), torch.ones(600), rtol=0, atol=1e-5)


def test_there_are_no_more_lines_than_vectors_have():
    _, vectors, _ = planted(60, 3)
    assert len(k_lines(vectors, 16)) == 3
    assert len(k_lines(vectors[:2], 16)) == 2
    assert k_lines(torch.ones(4, 9), 2).shape == (0, 9)


def test_each_line_is_the_leading_eigenvector_of_its_cluster(monkeypatch):
    monkeypatch.setattr(lines, "ENOUGH", 0.0)
    vectors, weight = draw(500), torch.rand(500, generator=torch.Generator().manual_seed(3))
    centres = k_lines(vectors, 4, weight=weight)
    points = standardise(vectors)
    labels = match(points, centres).labels
    for label, centre in enumerate(centres):
        own = labels == label
        moment = (weight[own, None] * points[own]).T @ points[own]
        leading = torch.linalg.eigh(moment.double()).eigenvectors[:, -1].float()
        assert float((leading @ centre).abs()) > 0.999


def test_a_vector_without_weight_does_not_count():
    _, vectors, labels = planted(90, 3)
    found = k_lines(vectors, 1, weight=(labels == 1).float())
    torch.testing.assert_close(
        match(standardise(vectors[1:2]), found).correlations.abs(), torch.ones(1)
    )


def test_a_line_that_lost_all_its_vectors_goes_to_the_worst_fitted():
    points = standardise(draw(20))
    centres = torch.stack([points[0], points[0]])  # the second never wins
    left = torch.arange(20.0)
    moved = lines._moved(points, torch.ones(20), torch.zeros(20).long(), left, centres)
    assert moved[1].equal(points[19])


def test_the_same_seed_gives_the_same_lines():
    vectors = draw(800)
    assert k_lines(vectors, 8, seed=5).equal(k_lines(vectors, 8, seed=5))
    assert not k_lines(vectors, 8, seed=5).equal(k_lines(vectors, 8, seed=6))


def test_the_few_vectors_with_most_of_the_mass_are_never_left_out(monkeypatch):
    monkeypatch.setattr(lines, "SAMPLE", 200)
    monkeypatch.setattr(lines, "SEEDS", 100)
    centres, vectors, _ = planted(5000, 4)
    vectors[4:] = draw(4996, seed=9)
    weight = torch.ones(5000)
    weight[:4] = 1e5
    found = k_lines(vectors, 4, weight=weight)
    assert float((found @ centres.T).abs().amax(dim=0).min()) > 0.999
