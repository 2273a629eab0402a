"""The certificate against answers known in closed form, on a prior simple enough to have them."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributions import Normal

from pfn import __version__ as pfn_version
from pfn.audits import AuditSizes
from pfn.card import ModelCard, read_card, save_checkpoint
from pfn.certify import (
    certificate_table,
    certify,
    certify_checkpoint,
    compute_references,
    default_cells,
)
from pfn.fresh_tasks import Progress, draw_tasks
from pfn.model import PFN
from pfn.predictive import Predictive
from pfn.transformer import Transformer, TransformerConfig
from priors import GaussianProcess, Tasks

NOISE = 0.25  # variance
MASSES = (0.5, 0.8, 0.9, 0.95)
FEW = AuditSizes(
    evidence_tasks=3,
    evidence_points=8,
    orders=2,
    martingale_tasks=3,
    martingale_draws=4,
    conflict_tasks=2,
    conflict_draws=19,
)


class Level:
    """A prior with a conjugate posterior: y = level + noise, level ~ Normal(0, scale^2)."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.calls = 0
        self.dies_at = math.inf

    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        x = torch.rand(batch, n, d, dtype=torch.float64, generator=generator)
        level = self.scale * torch.randn(batch, 1, dtype=torch.float64, generator=generator)
        noise = torch.randn(batch, n, dtype=torch.float64, generator=generator)
        return Tasks(x, level + math.sqrt(NOISE) * noise, level.expand(batch, n), {})

    def posterior(
        self, context: tuple[Tensor, Tensor], x_query: Tensor, latent: bool = False
    ) -> Normal:
        if self.calls >= self.dies_at:
            raise KeyboardInterrupt
        self.calls += 1
        y = context[1]
        precision = self.scale**-2 + y.shape[-1] / NOISE
        mean = y.sum(-1, keepdim=True) / NOISE / precision
        variance = 1 / precision + (0.0 if latent else NOISE)
        return Normal(mean.expand(x_query.shape[:-1]), math.sqrt(variance))


class Noisy(Normal):
    """A posterior that states an error of its log density."""

    def log_prob_error(self, value: Tensor) -> Tensor:
        return torch.full_like(value, 0.06)


class NoisyLevel(Level):
    def posterior(self, *args: Any, **options: Any) -> Noisy:
        exact = super().posterior(*args, **options)
        return Noisy(exact.loc, exact.scale)


class SampleOnly:
    def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
        return Level().sample(batch, n, d, generator=generator)


class Oracle(PFN):
    """In place of a network: the exact posterior, its standard deviation times `spread`."""

    def __init__(self, prior: Level, spread: float = 1.0) -> None:
        network = tiny_network()
        super().__init__(network, tiny_card(network), prior)
        self.exact, self.spread = prior, spread

    def condition(self, context: Any, **options: Any) -> Any:
        return OracleFitted(self, context)

    def predict(self, context: Any, x_query: Any, **options: Any) -> Predictive:
        return OracleFitted(self, context).predict(x_query)


class OracleFitted:
    def __init__(self, oracle: Oracle, context: tuple[Tensor, Tensor]) -> None:
        self.oracle, self.context = oracle, context

    def predict(self, x_query: Tensor, *, latent: bool = False) -> Predictive:
        exact = self.oracle.exact.posterior(self.context, x_query, latent)
        mean, std = exact.mean.unsqueeze(-1), self.oracle.spread * exact.stddev.unsqueeze(-1)
        return Predictive(torch.zeros_like(mean), mean, std)


def tiny_network(max_features: int = 2) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(
        max_features=max_features, width=16, layers=1, heads=2, expansion=1, components=3
    )
    return Transformer(config).requires_grad_(False).eval()


def tiny_card(network: Transformer, prior: dict[str, Any] | None = None) -> ModelCard:
    return ModelCard(
        name="tiny", architecture=network.config, prior=prior, max_context=32, library="test"
    )


def test_exact_predictions_have_no_gap_and_nominal_coverage() -> None:
    certificate = certify(Oracle(Level()), tasks=20, queries=16, seed=1, audits=False)
    gap = certificate["gap"]
    # float64 through different formulas: rounding, not statistics
    assert abs(gap["mean"]) < 1e-12
    assert max(abs(gap["median_task"]), abs(gap["worst_task"])) < 1e-12
    assert [(cell["n"], cell["d"]) for cell in gap["cells"]] == [(5, 1), (20, 1), (5, 2), (20, 2)]
    assert [item["standardize"] for item in certificate["coverage"]] == [False, True]
    for item in certificate["coverage"]:
        assert item["tasks"] == 1000
        assert item["pit"]["p_value"] > 1e-3
        assert [interval["mass"] for interval in item["intervals"]] == list(MASSES)
        for interval in item["intervals"]:
            assert abs(interval["fraction"] - interval["mass"]) < 4 * interval["standard_error"]


def test_narrow_predictions_show_the_gap_and_coverage_that_formulas_give() -> None:
    s = 0.8
    oracle, cells = Oracle(Level(), spread=s), [(5, 1), (20, 2)]
    certificate = certify(oracle, tasks=150, queries=16, cells=cells, audits=False)
    expected = math.log(s) + (s**-2 - 1) / 2  # KL(Normal(m, 1) || Normal(m, s^2)) = 0.058
    gap = certificate["gap"]
    assert 0 < gap["standard_error"] < 0.01
    assert abs(gap["mean"] - expected) < 4 * gap["standard_error"]
    for cell in gap["cells"]:
        assert abs(cell["mean"] - expected) < 4 * cell["standard_error"]
    assert gap["median_task"] < gap["worst_task"]
    standard = Normal(0.0, 1.0)
    for item in certificate["coverage"]:
        assert item["pit"]["p_value"] < 0.01
        for interval in item["intervals"]:
            half_width = s * standard.icdf(torch.tensor((1 + interval["mass"]) / 2))
            truth = float(2 * standard.cdf(half_width) - 1)
            assert abs(interval["fraction"] - truth) < 4 * interval["standard_error"]


def test_standard_error_of_the_gap_is_over_tasks() -> None:
    means, errors = [], []
    for seed in range(40):
        gap = certify(
            Oracle(Level(), spread=0.8),
            tasks=20,
            queries=4,
            cells=[(5, 1), (20, 1)],
            seed=seed,
            coverage_tasks=8,
            audits=False,
        )["gap"]
        means.append(gap["mean"])
        errors.append(gap["standard_error"])
    ratio = torch.tensor(means).std() / torch.tensor(errors).square().mean().sqrt()
    assert abs(ratio - 1) < 4 / math.sqrt(2 * 40)  # relative standard error of a std of 40 values


def test_tasks_are_a_function_of_seed_cell_and_index() -> None:
    prior = Level()
    five = draw_tasks(prior, 4, 2, tasks=5, queries=3, seed=0)
    torch.manual_seed(99)
    assert five.x.shape == (5, 4, 2) and five.x_query.shape == (5, 3, 2)
    assert five.y.shape == (5, 4) and five.y_query.shape == (5, 3)
    more = draw_tasks(prior, 4, 2, tasks=7, queries=3, seed=0)
    later = draw_tasks(prior, 4, 2, tasks=2, queries=3, seed=0, first=5)
    for part, whole, rest in zip(five, more, later, strict=True):
        assert torch.equal(part, whole[:5]) and torch.equal(rest, whole[5:])
    for other in (
        draw_tasks(prior, 4, 2, tasks=5, queries=3, seed=1),
        draw_tasks(prior, 4, 2, tasks=5, queries=3, seed=0, purpose="coverage"),
    ):
        assert not (other.y == five.y).any()
    assert len(five.y.unique()) == five.y.numel()


def test_references_are_the_log_densities_of_the_reference_posterior() -> None:
    prior = Level()
    (found,) = compute_references(prior, [(3, 1)], None, tasks=4, queries=6)
    drawn = draw_tasks(prior, 3, 1, tasks=4, queries=6, seed=0)
    expected = prior.posterior((drawn.x, drawn.y), drawn.x_query).log_prob(drawn.y_query)
    assert torch.allclose(found.log_prob, expected, rtol=0, atol=1e-12)
    assert found.error.isnan().all() and (found.seconds > 0).all()


def test_a_killed_computation_of_references_continues(tmp_path: Path) -> None:
    cells = [(3, 1), (6, 1)]
    killed = Level()
    killed.dies_at = 5
    with pytest.raises(KeyboardInterrupt):
        compute_references(killed, cells, tmp_path, tasks=4, queries=6)
    resumed = Level()
    reports: list[Progress] = []
    found = compute_references(resumed, cells, tmp_path, tasks=4, queries=6, report=reports.append)
    assert resumed.calls == 3
    assert [(item.done, item.total) for item in reports] == [(2, 4), (3, 4), (4, 4)]
    fresh = compute_references(Level(), cells, None, tasks=4, queries=6)
    for a, b in zip(found, fresh, strict=True):
        assert torch.equal(a.log_prob, b.log_prob)
    fewer = compute_references(resumed, cells, tmp_path, tasks=2, queries=6)
    assert resumed.calls == 3 and torch.equal(fewer[0].log_prob, fresh[0].log_prob[:2])
    compute_references(resumed, cells, tmp_path, tasks=5, queries=6)
    assert resumed.calls == 5
    compute_references(resumed, cells, tmp_path, tasks=1, queries=6, seed=1)
    assert resumed.calls == 7


def test_references_of_another_prior_are_not_reused(tmp_path: Path) -> None:
    compute_references(Level(), [(3, 1)], tmp_path, tasks=2, queries=6)
    with pytest.raises(ValueError, match="found other tasks"):
        compute_references(Level(scale=2.0), [(3, 1)], tmp_path, tasks=2, queries=6)


def test_workers_compute_the_same_references(tmp_path: Path) -> None:
    prior = GaussianProcess(lengthscale=0.3, outputscale=1.0, noise=0.1)
    alone = compute_references(prior, [(3, 1)], None, tasks=5, queries=6)
    shared = compute_references(prior, [(3, 1)], tmp_path, tasks=5, queries=6, workers=2)
    assert torch.allclose(alone[0].log_prob, shared[0].log_prob, rtol=0, atol=1e-12)


def test_a_reference_without_a_finite_density_is_an_error() -> None:
    class Broken(Level):
        def posterior(self, *args: Any, **options: Any) -> Normal:
            return Normal(super().posterior(*args, **options).mean, 1e-200)

    with pytest.raises(RuntimeError, match="not finite at task 0 of n = 3"):
        compute_references(Broken(), [(3, 1)], None, tasks=2, queries=6)


def test_the_error_that_a_reference_states_shrinks_with_independent_tasks() -> None:
    cells = [(3, 1), (6, 1)]
    options: dict[str, Any] = {"tasks": 9, "queries": 6, "cells": cells, "coverage_tasks": 8}
    options["audits"] = False
    gap = certify(Oracle(NoisyLevel()), **options)["gap"]
    for cell in gap["cells"]:
        assert cell["reference_error"] == pytest.approx(0.06 / 3)
        assert cell["reference_error_per_query"] == pytest.approx(0.06)
    assert gap["reference_error"] == pytest.approx(0.02 / math.sqrt(2))
    assert certify(Oracle(Level()), **options)["gap"]["reference_error"] is None


def test_an_untrained_network_gets_a_certificate_that_json_can_hold() -> None:
    network = tiny_network()
    pfn = PFN(network, tiny_card(network), Level())
    reports: list[Progress] = []
    certificate = certify(
        pfn,
        tasks=40,
        queries=8,
        coverage_tasks=40,
        audits=FEW,
        command="pfn certify tiny",
        report=reports.append,
    )
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert certificate["command"] == "pfn certify tiny" and certificate["seed"] == 0
    assert certificate["versions"] == {"pfn": pfn_version, "torch": torch.__version__}
    assert certificate["gap"]["mean"] > 3 * certificate["gap"]["standard_error"]
    latency = certificate["latency"]
    assert (latency["n"], latency["m"], latency["d"]) == (32, 1000, 2)
    assert latency["reference_over_predict"] == pytest.approx(
        latency["reference_seconds"] / latency["predict_seconds"]
    )
    stages = {item.stage for item in reports}
    audits = {"martingale", "orders", "buffer", "conflict"}
    assert {"gap", "coverage", "latency", "references, n = 5, d = 1"} | audits == stages - {
        f"references, n = {n}, d = {d}" for n, d in [(20, 1), (5, 2), (20, 2)]
    }
    for item in reports:
        assert 1 <= item.done <= item.total


def test_a_prior_without_posterior_gets_coverage_only() -> None:
    network = tiny_network()
    certificate = certify(
        PFN(network, tiny_card(network), SampleOnly()), coverage_tasks=16, audits=False
    )
    assert certificate["gap"] is None
    assert certificate["latency"]["reference_seconds"] is None
    assert len(certificate["coverage"]) == 2
    assert "no posterior" in printed(certificate)


def test_the_certificate_is_printed_as_a_table() -> None:
    text = printed(certify(Oracle(Level()), tasks=3, queries=8, coverage_tasks=16, audits=False))
    for words in (
        "Gap to the reference",
        "worst task",
        "not stated",
        "95 %",
        "PIT uniform",
        "ratio",
    ):
        assert words in text


def printed(certificate: dict[str, Any]) -> str:
    file = io.StringIO()
    Console(width=120, file=file).print(certificate_table(certificate))
    return file.getvalue()


def test_a_prior_that_is_not_known_is_named() -> None:
    network = tiny_network()
    with pytest.raises(ValueError, match=r"knows its prior; 'tiny'.*prior=my_prior"):
        certify(PFN(network, tiny_card(network), None))


def test_a_single_task_is_refused_for_want_of_a_standard_error() -> None:
    with pytest.raises(ValueError, match=r"at least 2 tasks.*tasks=1"):
        certify(Oracle(Level()), tasks=1)


def test_more_context_than_the_prior_allows_is_refused() -> None:
    class Prefixes(Level):
        def sample(self, batch: int, n: int, d: int, *, generator: torch.Generator) -> Tasks:
            return super().sample(batch, n, d, generator=generator)._replace(num_context=4)

    draw_tasks(Prefixes(), 4, 1, tasks=1, queries=3, seed=0)
    with pytest.raises(ValueError, match=r"at most 4 context points.*got n = 5"):
        draw_tasks(Prefixes(), 5, 1, tasks=1, queries=3, seed=0)


def test_default_cells_stay_within_what_the_network_was_trained_for() -> None:
    assert default_cells(1, 256) == [(5, 1), (20, 1), (60, 1), (200, 1)]
    assert default_cells(12, 256) == [(n, d) for d in (1, 2, 5, 12) for n in (5, 20, 60)]
    assert default_cells(3, 32) == [(n, d) for d in (1, 2) for n in (5, 20)]
    assert default_cells(1, 4) == [(4, 1)]


def test_a_checkpoint_gets_its_certificate_and_nothing_else_changes(tmp_path: Path) -> None:
    network = tiny_network(max_features=1)
    before = save_checkpoint(tmp_path, network, tiny_card(network))
    weights = (tmp_path / "model.safetensors").read_bytes()
    certificate = certify_checkpoint(
        tmp_path,
        prior=Level(),
        tasks=3,
        coverage_tasks=8,
        audits=False,
        references=tmp_path / "references",
    )
    after = read_card(tmp_path)
    assert after == dataclasses.replace(
        before, certificate=certificate, card_sha256=after.card_sha256
    )
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert [cell["tasks"] for cell in certificate["gap"]["cells"]] == [3, 3]


def test_the_exact_gaussian_process_certifies_itself() -> None:
    prior = GaussianProcess(lengthscale=0.3, outputscale=1.0, noise=0.1)
    found = compute_references(prior, [(5, 1)], None, tasks=3, queries=8)[0]
    drawn = draw_tasks(prior, 5, 1, tasks=3, queries=8, seed=0)
    theta = {
        "lengthscale": torch.tensor([0.3]),
        "outputscale": torch.ones(1),
        "noise": torch.tensor([0.1]),
        "mean": torch.zeros(1),
    }
    for i in range(3):
        x, x_query = drawn.x[i : i + 1], drawn.x_query[i : i + 1]
        K = prior.covariance(x, x, theta) + 0.1 * torch.eye(5)
        k = prior.covariance(x, x_query, theta)
        weights = torch.linalg.solve(K, k)[0]
        mean = weights.T @ drawn.y[i]
        variance = 1 + 0.1 - (weights * k[0]).sum(0)
        expected = Normal(mean, variance.sqrt()).log_prob(drawn.y_query[i])
        assert torch.allclose(found.log_prob[i], expected, rtol=0, atol=1e-6)  # jitter of 1e-10


def test_a_gap_can_be_kept(tmp_path: Path) -> None:
    network = tiny_network()
    save_checkpoint(tmp_path, network, tiny_card(network))
    options: dict[str, Any] = {"prior": Level(), "tasks": 3, "coverage_tasks": 8, "audits": False}
    with pytest.raises(ValueError, match="a gap to keep on the card of 'tiny'"):
        certify_checkpoint(tmp_path, keep_gap=True, **options)
    first = certify_checkpoint(tmp_path, command="first", **options)
    second = certify_checkpoint(
        tmp_path, keep_gap=True, command="second", **options | {"prior": SampleOnly()}
    )
    assert second["gap"] == first["gap"]
    assert (first["gap"]["command"], second["command"]) == ("first", "second")
