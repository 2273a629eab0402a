"""The reliability page shows what the card says, and says what it lacks."""

import dataclasses

import matplotlib.pyplot as plt
import pytest

import pfn
from pfn.audits import AuditSizes, in_words
from pfn.certify import certify
from pfn.reliability import plot_certificate

FEW = AuditSizes(
    joint_tasks=6,
    joint_draws=100,
    evidence_tasks=2,
    evidence_points=8,
    orders=2,
    martingale_tasks=4,
    martingale_draws=8,
    conflict_tasks=4,
    conflict_draws=19,
    latent_tasks=20,
    given_tasks=2,
)


@pytest.fixture(scope="module")
def card() -> pfn.ModelCard:
    model = pfn.load("gp-1d")
    certificate = certify(model, tasks=2, queries=4, coverage_tasks=40, audits=FEW)
    return dataclasses.replace(model.card, certificate=certificate)


def test_the_page_has_a_panel_for_each_part_of_the_certificate(card: pfn.ModelCard) -> None:
    figure = plot_certificate(card)
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [
        "Gap to the exact posterior",
        "Coverage of central intervals",
        "Uniform where calibrated",
        "Posterior of latents",
        "Covariance of joint draws",
        "Coherence and evidence",
    ]
    gap = figure.axes[0].lines[0].get_ydata().tolist()
    assert gap == [cell["mean"] for cell in card.certificate["gap"]["cells"]]
    written = {text.get_text() for text in figure.axes[-1].texts}
    assert {value for _, value in in_words(card.certificate)} <= written
    plt.close(figure)


def test_parts_that_do_not_apply_are_left_out(card: pfn.ModelCard) -> None:
    certificate = card.certificate | {"gap": None, "joint": None, "evidence": None, "latents": None}
    figure = plot_certificate(dataclasses.replace(card, certificate=certificate))
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[:3] == [
        "Coverage of central intervals",
        "Uniform where calibrated",
        "Coherence and evidence",
    ]
    plt.close(figure)


def test_a_card_without_audits_is_refused(card: pfn.ModelCard) -> None:
    old = dataclasses.replace(card, certificate={"gap": None, "coverage": []})
    with pytest.raises(ValueError, match="run pfn certify gp-1d"):
        plot_certificate(old)
