import pytest
import torch
from sklearn.cluster import Birch

from filterpress.clustering import cluster_means, count_clusters, kmeans


def test_planted_clusters_are_found_and_distances_are_euclidean():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    truth = torch.arange(30) % 3
    points = centres[truth] + 0.1 * torch.randn(30, 2, generator=generator)
    labels, distances = kmeans(points, 3)
    assert len({(int(a), int(b)) for a, b in zip(labels, truth, strict=True)}) == 3
    means = torch.stack([points[labels == k].mean(dim=0) for k in range(3)])
    torch.testing.assert_close(distances.float(), torch.cdist(points, means), rtol=1e-3, atol=1e-3)


def test_points_that_coincide_make_fewer_clusters_without_a_warning():
    labels, _ = kmeans(torch.ones(6, 2), 3)
    assert len(labels.unique()) == 1


def test_a_heavy_point_draws_its_centre():
    points = torch.tensor([[0.0], [1.0]])
    _, light = kmeans(points, 1)
    _, heavy = kmeans(points, 1, weight=torch.tensor([1.0, 99.0]))
    assert heavy[1, 0] < light[1, 0]


def numbers(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator), torch.rand(n, generator=generator) + 0.1


@pytest.mark.parametrize("radius", [0.003, 0.02, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("branching", [5, 50, 1000])
def test_birch_counts_the_clusters_that_scikit_learn_finds_in_order(radius, branching):
    values, _ = numbers()
    tree = Birch(threshold=radius, branching_factor=branching, n_clusters=None)
    tree.fit(values.sort().values[:, None].double().numpy())
    alike = torch.ones(len(values))
    assert count_clusters(values, alike, [radius], most=1000) == [len(tree.subcluster_centers_)]


def test_the_order_of_numbers_does_not_change_how_many_clusters_birch_finds():
    values, weight = numbers()
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(1))
    found = count_clusters(values, weight, [0.05, 0.3], most=1000)
    assert count_clusters(values[order], weight[order], [0.05, 0.3], most=1000) == found
    assert found[0] > found[1] > 1


def test_a_weight_of_two_is_two_numbers():
    values, _ = numbers()
    twice = torch.arange(len(values)) % 2 + 1
    found = count_clusters(values, twice, [0.05, 0.3], most=1000)
    every = values.repeat_interleave(twice)
    assert count_clusters(every, torch.ones(len(every)), [0.05, 0.3], most=1000) == found


def test_planted_clusters_are_counted_between_their_width_and_their_distance():
    centres = torch.tensor([-3.0, -1.0, 0.0, 0.7, 2.0])
    values = centres + 0.01 * torch.randn(500, 5, generator=torch.Generator().manual_seed(0))
    radii = [0.04, 0.1, 0.2, 10.0]
    found = count_clusters(values.flatten(), torch.ones(2500), radii, most=100)
    assert found == [5, 5, 5, 1]


def test_counting_ends_at_the_most():
    assert count_clusters(torch.arange(50.0), torch.ones(50), [0.0, 100.0], most=7) == [7, 1]


def test_numbers_far_from_zero_are_told_apart():
    values = 1e6 + torch.arange(4, dtype=torch.float64).repeat(25) + 1e-3 * torch.rand(100)
    assert count_clusters(values, torch.ones(100), [0.1], most=50) == [4]


def test_ten_million_numbers_have_the_clusters_of_a_sample_of_them():
    generator = torch.Generator().manual_seed(0)
    centres = torch.linspace(-1, 1, 9)
    values = centres.repeat(1_111_112)[:10_000_000]
    values = values + 0.01 * torch.randn(len(values), generator=generator)
    sample = values[::1001]
    found = [count_clusters(v, torch.ones(len(v)), [0.05], most=256) for v in (values, sample)]
    assert found == [[9], [9]]


@pytest.mark.parametrize("k", [1, 2, 7, 40])
def test_means_of_numbers_are_a_fixed_point_of_k_means(k):
    values, weight = numbers()
    means = cluster_means(values, k, weight=weight)
    assert len(means) == k
    nearest = (values[:, None] - means).abs().argmin(dim=1)
    of_each = [nearest == cluster for cluster in range(k)]
    expected = torch.stack([(weight * values)[one].sum() / weight[one].sum() for one in of_each])
    torch.testing.assert_close(means.float(), expected, rtol=0, atol=1e-5)
    assert (means.diff() > 0).all()


def test_means_of_numbers_are_as_good_as_those_of_scikit_learn():
    ours, theirs = [], []
    for seed in range(8):
        values, weight = numbers(seed=seed)
        means = cluster_means(values, 12, weight=weight, seed=seed)
        ours.append((weight * (values[:, None] - means).square().amin(dim=1)).sum())
        clusters = kmeans(values[:, None], 12, seed=seed, weight=weight)
        theirs.append((weight * clusters.distances.square().amin(dim=1)).sum())
    assert float(sum(ours)) == pytest.approx(float(sum(theirs)), rel=0.1)
