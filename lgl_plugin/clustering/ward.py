"""Ward's agglomerative clustering of weighted points."""

from __future__ import annotations

import numpy as np
import torch
from scipy import sparse

from lgl_plugin.clustering.vectors import exact_matmul
from lgl_plugin.utils.progress import tqdm

# Distances held at once, in bytes: a share of a CPU's last-level cache, and
# on a GPU enough to keep it busy.
DISTANCES = {"cpu": 16 * 2**20, "cuda": 2**30}


def ward(
    points: torch.Tensor, weights: torch.Tensor, n_clusters: int
) -> torch.Tensor:
    """Joins weighted points to clusters by Ward's method.

    Each round joins all reciprocal nearest neighbours (Murtagh 1983). Ward's
    distance is reducible: a union is no nearer to a third cluster than the
    nearer of its parts was. So the rounds find the joins of one at a time in
    another order, and the lowest N - n_clusters of them are the result.
    Distances are computed in blocks and never kept.

    The points (N, D) are float32 or float64, on any device; one of weight w,
    above 0, counts as w equal ones. Returns the cluster of each (N,), int64,
    from 0 to `n_clusters` - 1, on their device.
    """
    if len(points) == n_clusters:
        return torch.arange(n_clusters, device=points.device)
    means, weights = points, weights.to(points, copy=True)
    names = torch.arange(len(points), device=points.device)
    heights = torch.zeros_like(weights)  # of the last join in each cluster
    nearest, gaps = torch.zeros_like(names), torch.zeros_like(weights)
    stale = names  # clusters whose nearest neighbour must be looked up
    # Of each round: names kept, names dropped, heights.
    joins: list[tuple[torch.Tensor, ...]] = []
    n_joins = len(points) - n_clusters
    n_sure = 0  # joins that are lower than all to come
    with exact_matmul(), tqdm(total=n_joins, desc="Ward", unit="join") as bar:
        while True:
            nearest[stale], gaps[stale] = _neighbours(means, weights, stale)
            lowest = gaps.min()
            below = [int((rise <= lowest).sum()) for *_, rise in joins]
            bar.update(min(sum(below), n_joins) - n_sure)
            n_sure = min(sum(below), n_joins)
            if n_sure == n_joins:
                break

            order = torch.arange(len(nearest), device=points.device)
            mutual = (nearest[nearest] == order) & (order < nearest)
            kept = mutual.nonzero()[:, 0]
            # Rounding can make equal distances a circle of neighbours with no
            # mutual pair, and the loop would never end: join the nearest.
            if len(kept) == 0:
                kept = gaps.argmin().view(1)
            dropped = nearest[kept]
            # Rounding must not put a join below one that it builds on.
            height = gaps[kept].maximum(heights[kept]).maximum(heights[dropped])
            joins.append((names[kept], names[dropped], height))

            weight = weights[kept] + weights[dropped]
            share = (weights[dropped] / weight)[:, None]
            means = means.index_copy(
                0, kept, means[kept].lerp(means[dropped], share)
            )
            weights[kept], heights[kept] = weight, height
            # By reducibility a neighbour changes only if it was joined.
            joined = torch.zeros_like(mutual)
            joined[kept] = joined[dropped] = True
            left = torch.ones_like(mutual)
            left[dropped] = False
            stale = (joined | joined[nearest])[left].nonzero()[:, 0]
            nearest = (left.cumsum(dim=0) - 1)[nearest]
            means, weights, heights, names, nearest, gaps = (
                of_each[left]
                for of_each in (means, weights, heights, names, nearest, gaps)
            )
    kept, dropped, height = (torch.cat(parts) for parts in zip(*joins))
    first = height.argsort(stable=True)[:n_joins].cpu()
    joined = sparse.coo_matrix(
        (np.ones(n_joins), (kept.cpu()[first], dropped.cpu()[first])),
        shape=(len(points), len(points)),
    )
    labels = sparse.csgraph.connected_components(joined, directed=False)[1]
    return torch.from_numpy(labels).to(points.device, torch.int64)


def _neighbours(means, weights, rows):
    """Returns the nearest cluster of each row and Ward's distance to it."""
    block = max(1, DISTANCES[means.device.type] // (8 * len(means)))
    block = min(block, len(rows))
    squares = (means**2).sum(dim=1)
    inverse = 1 / weights
    nearest, closest = torch.empty_like(rows), means.new_empty(len(rows))
    # One buffer: allocation per block would cost as much as the products.
    buffers = means.new_empty(2, block, len(means))
    for start in range(0, len(rows), block):
        now = slice(start, start + block)
        some = rows[now]
        gaps, scales = buffers[:, : len(some)]
        torch.addmm(squares, means[some], means.T, alpha=-2, out=gaps)
        gaps += squares[some, None]
        gaps /= torch.add(inverse[some, None], inverse, out=scales)
        gaps.scatter_(1, some[:, None], torch.inf)  # not its own neighbour
        torch.min(gaps, dim=1, out=(closest[now], nearest[now]))
    return nearest, closest
