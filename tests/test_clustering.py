import torch

from filterpress.clustering import kmeans


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
