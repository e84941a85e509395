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

    def without(self, embeddings: torch.Tensor) -> Stats:
        """As if these (k, P, n), which were learned, had not been: `merged` backwards."""
        k, rest = len(embeddings), self.count - len(embeddings)
        assert rest > 1, "of one picture alone there is no covariance"
        away = embeddings - self.mean
        gap = away.mean(dim=0)  # (P, n)
        scatter = self.covariance * (self.count - 1)
        spread = away.permute(1, 2, 0)  # (P, n, k)
        scatter.baddbmm_(spread, spread.transpose(1, 2), alpha=-1)
        scatter.baddbmm_(gap[:, :, None], gap[:, None], alpha=-k * k / rest)
        return Stats(rest, self.mean - gap * (k / rest), scatter.div_(rest - 1))

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


class LeftOut:
    """Distances to the statistics without some of the pictures that are in them.

    Without k of n pictures the scatter loses U M U^T, where the columns of U are their differences
    from the mean and M = 1 + 1/(n - k) in every place (+ 1 on the diagonal). So the inverse of the
    covariance follows from that of the whole one (Woodbury, 1950), and nothing is inverted anew for
    each picture: only once for each number k.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._whitening: dict[int, torch.Tensor] = {}  # by how many are left out; the newest only

    def whitened(self, embeddings: torch.Tensor, k: int) -> torch.Tensor:
        """Embeddings (q, P, n) as `distances` takes them where k are left out: (P, n, q)."""
        return self._for(k) @ (embeddings - self._stats.mean).permute(1, 2, 0)

    def distances(self, asked: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Mahalanobis distances (q, P) of whitened pictures (P, n, q), without those (P, n, k)."""
        k = out.shape[2]
        rest = self._stats.count - k
        assert rest > 1, "of one picture alone there is no covariance"
        asked, out = asked.double(), out.double()  # differences of what is nearly the same
        asked = asked + out.mean(dim=2, keepdim=True) * (k / rest)  # the mean moves as well
        inner = (
            torch.linalg.inv(torch.eye(k).double() + 1 / rest) * (rest - 1)
            - out.transpose(1, 2) @ out
        )
        seen = out.transpose(1, 2) @ asked  # (P, k, q)
        correction = (seen * torch.linalg.solve(inner, seen)).sum(dim=1)
        square: torch.Tensor = asked.square().sum(dim=1) + correction  # (P, q)
        return square.clamp_min(0).sqrt().T.float()

    def _for(self, k: int) -> torch.Tensor:
        if k not in self._whitening:
            whole, rest = self._stats, self._stats.count - k
            covariance = whole.covariance * ((whole.count - 1) / (rest - 1))
            self._whitening = {k: Stats(whole.count, whole.mean, covariance).whitening()}
        return self._whitening[k]
