"""One Gaussian per position of a map: of embeddings, merged exactly, turned into a distance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

RIDGE = 0.01 + 1e-5  # anomalib adds both to the diagonal of every covariance
CHUNK = 256  # positions factorised at once


@dataclass(frozen=True)
class Stats:
    """Mean and covariance of the embeddings at each of P positions, and of how many images."""

    count: int  # 0 where an older tool did not say
    mean: torch.Tensor  # (P, n) float32
    covariance: torch.Tensor  # (P, n, n) float32

    @classmethod
    def of(cls, embeddings: torch.Tensor) -> Stats:
        """Of embeddings (images, P, n)."""
        mean = embeddings.mean(dim=0)
        centred = (embeddings - mean).permute(1, 2, 0)  # (P, n, images)
        scatter = centred @ centred.transpose(1, 2)
        return cls(len(embeddings), mean, scatter.div_(max(1, len(embeddings) - 1)))

    def merged(self, other: Stats) -> Stats:
        """As if both had been learned from at once (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        between = other.mean - self.mean
        covariance = self.covariance * ((self.count - 1) / (count - 1))
        covariance.add_(other.covariance, alpha=(other.count - 1) / (count - 1))
        weight = self.count * other.count / count / (count - 1)
        covariance.baddbmm_(between[:, :, None], between[:, None], alpha=weight)
        return Stats(count, self.mean + between * (other.count / count), covariance)

    def whitening(self) -> torch.Tensor:
        """W (P, n, n), lower triangular: |W (x - mean)| is the Mahalanobis distance of x.

        W = L^-1 with L L^T = covariance + RIDGE.
        """
        whitening = torch.empty_like(self.covariance)
        identity = torch.eye(self.covariance.shape[1])
        for start in range(0, len(whitening), CHUNK):
            positions = slice(start, start + CHUNK)
            factor = torch.linalg.cholesky(self.covariance[positions] + RIDGE * identity)
            whitening[positions] = torch.linalg.solve_triangular(factor, identity, upper=False)
        return whitening
