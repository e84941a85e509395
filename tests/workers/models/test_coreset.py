"""The coreset is that of the plain greedy loop, and says truly how well it covers."""

from __future__ import annotations

import pytest
import torch

from workers.models.coreset import CHUNK, DIMENSIONS, TOGETHER, k_centre_greedy


def clustered(seed: int, n: int = 400, channels: int = 96, clusters: int = 12) -> torch.Tensor:
    """Rows (n, channels) float32 as patches lie: in clusters of unequal width, far from zero."""
    random = torch.Generator().manual_seed(seed)
    centres = 5 + 3 * torch.randn(clusters, channels, generator=random)
    widths = 0.1 + torch.rand(clusters, 1, generator=random)
    of = torch.randint(clusters, (n,), generator=random)
    return centres[of] + widths[of] * torch.randn(n, channels, generator=random)


def plain_greedy(
    rows: torch.Tensor, count: int, nearest: torch.Tensor | None = None, stop_radius: float = 0.0
) -> list[int]:
    """The textbook loop: all columns, float64, the distance of every row at every step."""
    rows = rows.double()
    if nearest is None:
        centre = int((rows - rows.mean(dim=0)).norm(dim=1).argmin())
        nearest = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    else:
        nearest = nearest.double()
        centre = int(nearest.argmax())
    chosen: list[int] = []
    while len(chosen) < count and nearest[centre] > stop_radius:
        chosen.append(centre)
        nearest = torch.minimum(nearest, (rows - rows[centre]).norm(dim=1))
        centre = int(nearest.argmax())
    return chosen


def distance_to(rows: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Distance of each row to the nearest row of a bank, brute force in float64: (n,)."""
    return (rows.double()[:, None] - bank.double()[None]).norm(dim=2).amin(dim=1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("channels", [DIMENSIONS - 29, DIMENSIONS, DIMENSIONS + 1, 96])
def test_it_chooses_what_the_plain_loop_over_all_columns_chooses(seed: int, channels: int) -> None:
    rows = clustered(seed, channels=channels)
    chosen, _, _ = k_centre_greedy(rows, 60)
    assert chosen.tolist() == plain_greedy(rows, 60)


@pytest.mark.parametrize("clusters", [40, 5000])  # of 5000 no axis tells more than another
def test_nor_is_it_another_where_rows_are_looked_at_in_pieces(clusters: int) -> None:
    rows = clustered(1, n=CHUNK + 500, clusters=clusters)
    count = 2 * TOGETHER + 50
    chosen, _, owners = k_centre_greedy(rows, count)
    assert chosen.tolist() == plain_greedy(rows, count)
    away = (rows - rows[chosen][owners]).norm(dim=1)
    assert torch.allclose(away.double(), distance_to(rows, rows[chosen]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 7, 60])
def test_the_radius_it_returns_is_the_largest_distance_of_any_row(seed: int, count: int) -> None:
    rows = clustered(seed)
    chosen, radius, _ = k_centre_greedy(rows, count)
    assert len(chosen) == count
    assert radius == pytest.approx(float(distance_to(rows, rows[chosen]).max()), rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_of_covered_rows_none_is_chosen_and_it_stops_at_the_radius(seed: int) -> None:
    rows, known = clustered(seed), clustered(seed)[::4]
    covered_to = distance_to(rows, known).float()
    stop_radius = float(covered_to.max()) / 2
    chosen, radius, _ = k_centre_greedy(rows, 400, covered_to=covered_to, stop_radius=stop_radius)
    assert 0 < len(chosen) < 400
    assert chosen.tolist() == plain_greedy(rows, 400, covered_to, stop_radius)
    assert (covered_to[chosen] > stop_radius).all()
    assert radius <= stop_radius
    together = torch.cat([known, rows[chosen]])
    assert radius == pytest.approx(float(distance_to(rows, together).max()), rel=1e-4)


def test_where_all_is_covered_nothing_is_chosen() -> None:
    rows = clustered(0)
    covered_to = torch.full((len(rows),), 0.5)
    chosen, radius, _ = k_centre_greedy(rows, 10, covered_to=covered_to, stop_radius=0.5)
    assert chosen.tolist() == []
    assert radius == 0.5


def test_a_count_that_ends_an_update_early_leaves_the_true_radius() -> None:
    rows, known = clustered(1), clustered(1)[:5]
    covered_to = distance_to(rows, known).float()
    chosen, radius, _ = k_centre_greedy(rows, 4, covered_to=covered_to, stop_radius=0.01)
    assert len(chosen) == 4
    together = torch.cat([known, rows[chosen]])
    assert radius == pytest.approx(float(distance_to(rows, together).max()), rel=1e-4)


def test_a_count_above_the_rows_chooses_each_row_once() -> None:
    rows = clustered(2, n=50)
    chosen, radius, _ = k_centre_greedy(rows, 10_000)
    assert sorted(chosen.tolist()) == list(range(50))
    assert radius == 0


@pytest.mark.parametrize("seed", range(3))
def test_of_equal_rows_one_is_chosen(seed: int) -> None:
    distinct = clustered(seed, n=40)
    rows = distinct.repeat(5, 1)[torch.randperm(200, generator=torch.Generator().manual_seed(seed))]
    chosen, radius, _ = k_centre_greedy(rows, 200)
    assert len(torch.unique(rows[chosen], dim=0)) == len(chosen) == 40
    assert radius == 0


def test_rows_that_are_all_equal_give_one() -> None:
    chosen, radius, _ = k_centre_greedy(torch.full((30, 64), 3.7), 10)
    assert len(chosen) == 1
    assert radius == 0


def test_one_row_gives_that_row() -> None:
    chosen, radius, _ = k_centre_greedy(torch.randn(1, 64), 5)
    assert chosen.tolist() == [0]
    assert radius == 0


def test_progress_ends_with_what_was_chosen() -> None:
    seen: list[tuple[int, int]] = []
    k_centre_greedy(clustered(3), 200, report=lambda done, total: seen.append((done, total)))
    assert len(seen) > 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(done < total for done, total in seen[:-1])
    assert seen[-1] == (200, 200)


def test_the_rows_given_are_left_as_they_were() -> None:
    rows = clustered(4)
    before, covered_to = rows.clone(), torch.full((len(rows),), 9.0)
    k_centre_greedy(rows, 20)
    k_centre_greedy(rows, 20, covered_to=covered_to)
    assert torch.equal(rows, before)
    assert (covered_to == 9.0).all()


def test_the_threads_of_torch_come_back_even_after_an_error() -> None:
    def fail(done: int, total: int) -> None:
        assert torch.get_num_threads() == 1
        raise KeyboardInterrupt

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        k_centre_greedy(clustered(5), 20)
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt):
            k_centre_greedy(clustered(5), 200, report=fail)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
