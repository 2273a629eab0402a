"""Student-t distributions and positive scales against scipy and quadrature."""

import math

import pytest
import scipy.special
import scipy.stats
import torch
from torch.distributions import constraints

from priors import BurrXII
from priors.draws import draw
from priors.student_t import MultivariateStudentT, StudentT, incomplete_beta


@pytest.mark.parametrize("df", [0.7, 2.0, 5.0, 41.0, 3000.0])
def test_cdf_is_scipys(df: float) -> None:
    t = torch.cat([torch.linspace(-60, 60, 2001), torch.tensor([0.0, 1e-9, -1e-9, 1e6])]).double()
    ours = StudentT(torch.full_like(t, df), torch.full_like(t, 0.5), torch.full_like(t, 2.0))
    expected = torch.from_numpy(scipy.stats.t(df, 0.5, 2.0).cdf(t.numpy()))
    torch.testing.assert_close(ours.cdf(t), expected, atol=2e-15, rtol=1e-11)


@pytest.mark.parametrize("df", [0.7, 1.0, 2.0, 5.0, 300.0])
def test_quantiles_are_scipys(df: float) -> None:
    level = torch.tensor([1e-9, 1e-3, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    ours = StudentT(torch.full_like(level, df), torch.tensor(0.5).double(), 2.0)
    expected = torch.from_numpy(scipy.stats.t(df, 0.5, 2.0).ppf(level.numpy()))
    torch.testing.assert_close(ours.icdf(level), expected, rtol=1e-9, atol=1e-12)


def test_incomplete_beta_is_scipys() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (10 ** (4 * torch.rand(500, generator=g, dtype=torch.float64) - 1.5) for _ in "ab")
    x = torch.rand(500, generator=g, dtype=torch.float64)
    expected = torch.from_numpy(scipy.special.betainc(a.numpy(), b.numpy(), x.numpy()))
    torch.testing.assert_close(incomplete_beta(a, b, x, 1 - x), expected, atol=1e-13, rtol=1e-9)


def joint(df: float = 5.0) -> tuple[MultivariateStudentT, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64)
    shape = root @ root.T + torch.eye(4)
    loc = torch.randn(4, generator=g, dtype=torch.float64)
    factor = torch.linalg.cholesky(shape)
    return MultivariateStudentT(torch.tensor(df).double(), loc, factor), loc, shape


def test_joint_density_is_scipys() -> None:
    ours, loc, shape = joint()
    at = torch.randn(50, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    expected = scipy.stats.multivariate_t(loc.numpy(), shape.numpy(), df=5.0).logpdf(at.numpy())
    torch.testing.assert_close(ours.log_prob(at), torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_joint_laws_expand() -> None:
    ours, loc, _ = joint()
    wide = ours.expand((3,))
    assert wide.batch_shape == (3,) and wide.sample((2,)).shape == (2, 3, 4)
    torch.testing.assert_close(wide.log_prob(loc), ours.log_prob(loc).expand(3))


def test_joint_draws_have_the_moments() -> None:
    ours, loc, shape = joint(9.0)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        drawn = ours.sample((200_000,))
    torch.testing.assert_close(ours.covariance_matrix, 9 / 7 * shape)
    torch.testing.assert_close(ours.variance, ours.covariance_matrix.diagonal())
    centred = drawn - loc
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(shape), centred.T, upper=False).T
    square = z.square().sum(-1) / 4
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * len(drawn)))
    assert scipy.stats.kstest(square.numpy(), scipy.stats.f(4, 9.0).cdf).statistic < bound


@pytest.mark.parametrize(("c", "d"), [(1.0, 1.0), (2.0, 1.5), (0.6, 4.0)])
def test_burr_is_scipys(c: float, d: float) -> None:
    ours = BurrXII(torch.tensor(c, dtype=torch.float64), torch.tensor(d, dtype=torch.float64))
    theirs = scipy.stats.burr12(c, d)
    s = torch.logspace(-6, 6, 200, dtype=torch.float64)
    for name, other in (("log_prob", "logpdf"), ("cdf", "cdf")):
        expected = torch.from_numpy(getattr(theirs, other)(s.numpy()))
        torch.testing.assert_close(getattr(ours, name)(s), expected, atol=1e-12, rtol=1e-12)
    u = torch.linspace(1e-6, 0.999, 50, dtype=torch.float64)
    torch.testing.assert_close(ours.cdf(ours.icdf(u)), u, atol=1e-12, rtol=1e-9)
    if c * d > 2:
        assert float(ours.mean) == pytest.approx(theirs.mean(), rel=1e-8)
        assert float(ours.variance) == pytest.approx(theirs.var(), rel=1e-8)
    assert ours.support is constraints.positive


def test_burr_draws_follow_its_cdf_and_heavy_moments_are_infinite() -> None:
    heavy = BurrXII(1.0, 0.8)
    assert float(heavy.mean) == math.inf and float(heavy.variance) == math.inf
    drawn = draw(heavy, (20_000,), generator=torch.Generator().manual_seed(4))
    bound = math.sqrt(math.log(2 / 1e-6) / (2 * len(drawn)))
    theirs = scipy.stats.burr12(1.0, 0.8).cdf
    assert scipy.stats.kstest(drawn.numpy(), theirs).statistic < bound
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert scipy.stats.kstest(heavy.sample((20_000,)).numpy(), theirs).statistic < bound
