"""Problems of `bo.py`: synthetic functions, and tunings of models on data that scikit-learn has.

Each is a space of Optuna distributions and a function of one point, to be minimised; those of
several objectives have a reference point.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import common  # noqa: F401  before torch
import numpy as np
import torch
from botorch.test_functions import DTLZ2, Ackley, Branin, BraninCurrin, Hartmann
from numpy.typing import NDArray
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from sklearn import datasets
from sklearn.base import BaseEstimator
from sklearn.ensemble import GradientBoostingClassifier, RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from priors import BNN

Point = dict[str, Any]


class Problem(NamedTuple):
    """Something to minimise."""

    space: dict[str, BaseDistribution]
    function: Callable[[Point], Any]  # a number, or one for each objective
    true: Callable[[Point], float] | None = None  # without noise, where the function has some
    reference: tuple[float, ...] = ()  # of several objectives: worse than all that matters


def box(d: int, low: float = 0.0, high: float = 1.0) -> dict[str, BaseDistribution]:
    return {f"x{i}": FloatDistribution(low, high) for i in range(d)}


def vector(point: Point) -> NDArray[np.float64]:
    return np.array(list(point.values()), dtype=float)


# synthetic


def of_botorch(problem: Any, point: Point) -> Any:
    value = problem(torch.from_numpy(vector(point)).unsqueeze(0)).squeeze(0)
    return value.item() if value.dim() == 0 else value.tolist()


def synthetic(problem: Any) -> Problem:
    """A function of BoTorch; several objectives come with a reference point."""
    low, high = problem.bounds.double()
    space: dict[str, BaseDistribution] = {
        f"x{i}": FloatDistribution(float(a), float(b))
        for i, (a, b) in enumerate(zip(low, high, strict=True))
    }
    reference = tuple(map(float, problem.ref_point)) if problem.num_objectives > 1 else ()
    return Problem(space, partial(of_botorch, problem), reference=reference)


def network_draw(d: int) -> Problem:
    """A function drawn from a network of two layers of 256 tanh units, of d inputs.

    The study draws such functions of 400 inputs (Li, Rudner and Wilson, arXiv 2305.20028).
    """
    prior = BNN(width=256, depth=2, weight_variance=(20.0, 4.0, 1.0), noise=1e-6)
    parameters = prior.draw_parameters(1, d, generator=torch.Generator().manual_seed(0))

    def function(point: Point) -> float:
        return float(prior.functions(parameters, torch.from_numpy(vector(point))[None, None]))

    return Problem(box(d), function)


def noisy() -> Problem:
    """Hartmann's function of 3 inputs, through noise of 0.3, a tenth of its range."""
    hartmann, rng = Hartmann(dim=3), np.random.default_rng(0)

    def function(point: Point) -> float:
        return float(of_botorch(hartmann, point)) + 0.3 * float(rng.standard_normal())

    true = partial(of_botorch, hartmann)
    return Problem(box(3), function, true)


def nonstationary() -> Problem:
    """Fast waves in one corner of the square, a smooth slope elsewhere.

    In each input the function of Xiong et al., International Journal for Numerical Methods in
    Engineering 70, 2007, which made it to show what stationary processes miss.
    """

    def function(point: Point) -> float:
        x = vector(point)
        waves = np.sin(30 * (x - 0.9) ** 4) * np.cos(2 * (x - 0.9)) + (x - 0.9) / 2
        return float(waves.sum())

    return Problem(box(2), function)


def embedded() -> Problem:
    """Hartmann's function of 6 of 50 inputs."""
    hartmann = Hartmann(dim=6)
    columns = np.random.default_rng(0).permutation(50)[:6]

    def function(point: Point) -> float:
        return float(hartmann(torch.from_numpy(vector(point)[columns]).unsqueeze(0)))

    return Problem(box(50), function)


DISCOUNT = np.array([0.0, 0.2, 0.3, 0.3, 0.0])  # of all stages with one pesticide, at most
PRICE = np.array([0.0, 1.0, 0.8, 0.7, 0.5])
RESISTANCE = np.array([0.0, 1.0, 2.5, 2.0, 0.5]) / 7  # that pests develop
EFFECT = np.array([1.0, 2.0, 3.0, 3.0, 5.0]) / 7  # second parameter of a beta law, the first is 1


def pest_control() -> Problem:
    """One of four pesticides, or none, in each of 25 stages: cost plus the share of bad stages.

    Reference: Oh, Tomczak, Gavves and Welling, Combinatorial Bayesian Optimization using the Graph
    Cartesian Product, NeurIPS 2019, section 4; its random numbers are fixed here.
    """

    def function(point: Point) -> float:
        chosen = np.array([int(value) for value in point.values()])
        rng, effect = np.random.default_rng(0), EFFECT.copy()
        pests, total = rng.beta(1, 30, 100), 0.0
        for pesticide in chosen:
            spread, control = rng.beta(1, 17 / 3, 100), rng.beta(1, effect[pesticide], 100)
            total += float((pests > 0.1).mean())
            if pesticide:
                share = float((chosen == pesticide).mean())
                total += PRICE[pesticide] * (1 - DISCOUNT[pesticide] * share)
                effect[pesticide] += RESISTANCE[pesticide] / len(chosen)
                pests = (1 - control) * pests
            else:
                pests = pests + spread * (1 - pests)
        return total

    space: dict[str, BaseDistribution] = {
        f"stage{i}": CategoricalDistribution(list("01234")) for i in range(25)
    }
    return Problem(space, function)


LANDINGS = 10
COAST, LEFT, DOWN, RIGHT = range(4)  # engines that fire


def lander() -> Problem:
    """Minus the mean reward of a controller of Lunar Lander, over the same landings each time.

    Of its twelve constants the game's own values solve it; here each is in [0, 2]. Needs
    `pip install "gymnasium[box2d]"`.

    Reference: Eriksson, Pearce, Gardner, Turner and Poloczek, Scalable Global Optimization via
    Local Bayesian Optimization, NeurIPS 2019, with 50 landings; Gymnasium's
    `lunar_lander.heuristic`.
    """
    import gymnasium

    game = gymnasium.make("LunarLander-v3")

    def function(point: Point) -> float:
        constants, total = vector(point), 0.0
        for seed in range(LANDINGS):
            state, _ = game.reset(seed=seed)
            over = False
            while not over:
                state, reward, crashed, late, _ = game.step(fire(state, constants))
                total += float(reward)
                over = crashed or late
        return -total / LANDINGS

    return Problem(box(12, 0.0, 2.0), function)


def fire(state: NDArray[np.float32], c: NDArray[np.float64]) -> int:
    """The engine for a state: place, speed, angle, its speed, and whether each leg stands."""
    x, y, speed_x, speed_y, angle, turning, *legs = state
    tilt = np.clip(c[0] * x + c[1] * speed_x, -c[2], c[2])  # towards the middle
    turn = c[4] * (tilt - angle) - c[5] * turning
    rise = c[6] * (c[3] * abs(x) - y) - c[7] * speed_y
    if any(legs):
        turn, rise = c[8], -c[9] * speed_y
    if rise > max(abs(turn), c[10]):
        return DOWN
    if abs(turn) > c[11]:
        return RIGHT if turn < 0 else LEFT
    return COAST


def ordinal() -> Problem:
    """Ackley's function on a grid: three of six inputs take 11 values, two are choices of three."""
    ackley = Ackley(dim=6)
    space: dict[str, BaseDistribution] = {
        **{f"i{i}": IntDistribution(-5, 5) for i in range(3)},
        "x": FloatDistribution(-5.0, 5.0),
        **{f"c{i}": CategoricalDistribution(["a", "b", "c"]) for i in range(2)},
    }
    meaning = {"a": -2.0, "b": 0.5, "c": 2.5}

    def function(point: Point) -> float:
        x = [float(meaning.get(value, value)) + 0.3 for value in point.values()]
        return float(ackley(torch.tensor(x, dtype=torch.float64).unsqueeze(0)))

    return Problem(space, function)


# real tunings: cross-validated errors of models, on data that come with scikit-learn


@cache
def data(name: str) -> tuple[NDArray[Any], NDArray[Any]]:
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))[:600]
    return x[order], y[order]


def score(estimator: BaseEstimator, name: str, scoring: str) -> float:
    """Minus the mean of a score over three folds."""
    x, y = data(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return -float(cross_val_score(estimator, x, y, cv=3, scoring=scoring).mean())


def real(
    space: dict[str, BaseDistribution], make: Callable[..., BaseEstimator], name: str, scoring: str
) -> Problem:
    def function(point: Point) -> float:
        return score(make_pipeline(StandardScaler(), make(**point)), name, scoring)

    return Problem(space, function)


def log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


def mlp(units: int, layers: int, **settings: Any) -> BaseEstimator:
    return MLPClassifier((units,) * layers, max_iter=40, random_state=0, **settings)


REAL: dict[str, Callable[[], Problem]] = {
    "SVM, digits": lambda: real(
        {
            "C": log(1e-3, 1e3),
            "gamma": log(1e-5, 1e1),
            "kernel": CategoricalDistribution(["rbf", "poly", "sigmoid"]),
            "coef0": FloatDistribution(-1.0, 1.0),
        },
        SVC,
        "digits",
        "accuracy",
    ),
    "SVR, diabetes": lambda: real(
        {"C": log(1e-2, 1e4), "gamma": log(1e-5, 1e1), "epsilon": log(1e-3, 1e2)},
        SVR,
        "diabetes",
        "neg_root_mean_squared_error",
    ),
    "forest, diabetes": lambda: real(
        {
            "max_depth": IntDistribution(1, 20),
            "min_samples_leaf": IntDistribution(1, 60, log=True),
            "max_features": FloatDistribution(0.1, 1.0),
            "ccp_alpha": log(1e-2, 1e3),
            "criterion": CategoricalDistribution(["squared_error", "poisson"]),
        },
        partial(RandomForestRegressor, n_estimators=20, random_state=0),
        "diabetes",
        "neg_root_mean_squared_error",
    ),
    "boosting, breast cancer": lambda: real(
        {
            "learning_rate": log(1e-3, 1.0),
            "n_estimators": IntDistribution(5, 60),
            "max_depth": IntDistribution(1, 6),
            "subsample": FloatDistribution(0.2, 1.0),
            "max_features": FloatDistribution(0.05, 1.0),
            "min_samples_leaf": IntDistribution(1, 50, log=True),
        },
        partial(GradientBoostingClassifier, random_state=0),
        "breast_cancer",
        "neg_log_loss",
    ),
    "network, digits": lambda: real(
        {
            "units": IntDistribution(4, 64, log=True),
            "layers": IntDistribution(1, 3),
            "learning_rate_init": log(1e-4, 1e-1),
            "alpha": log(1e-6, 1e1),
            "batch_size": IntDistribution(16, 256, log=True),
            "activation": CategoricalDistribution(["relu", "tanh"]),
            "beta_1": FloatDistribution(0.0, 0.99),
        },
        mlp,
        "digits",
        "neg_log_loss",
    ),
    "SGD, breast cancer": lambda: real(
        {
            "alpha": log(1e-7, 1e1),
            "l1_ratio": FloatDistribution(0.0, 1.0),
            "eta0": log(1e-5, 1e1),
            "power_t": FloatDistribution(0.05, 1.0),
            "learning_rate": CategoricalDistribution(["invscaling", "constant", "adaptive"]),
        },
        partial(SGDClassifier, loss="log_loss", penalty="elasticnet", max_iter=40, random_state=0),
        "breast_cancer",
        "neg_log_loss",
    ),
    "neighbours, wine": lambda: real(
        {
            "n_neighbors": IntDistribution(1, 60),
            "p": FloatDistribution(1.0, 6.0),
            "weights": CategoricalDistribution(["uniform", "distance"]),
        },
        KNeighborsClassifier,
        "wine",
        "neg_log_loss",
    ),
}

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Branin": lambda: synthetic(Branin()),
    "Hartmann-6": lambda: synthetic(Hartmann(dim=6)),
    "Ackley-10": lambda: synthetic(Ackley(dim=10, bounds=[(-10.0, 25.0)] * 10)),  # not centred
    "network draw, 10-d": lambda: network_draw(10),
    "network draw, 200-d": lambda: network_draw(200),
    "noisy Hartmann-3": noisy,
    "nonstationary": nonstationary,
    "Lunar Lander": lander,
    "pest control": pest_control,
    "ordinal Ackley": ordinal,
    "Hartmann-6 of 50": embedded,
    "BraninCurrin": lambda: synthetic(BraninCurrin()),
    "DTLZ2": lambda: synthetic(DTLZ2(dim=6, num_objectives=2)),
    **REAL,
}


def hypervolume(values: NDArray[np.float64], reference: tuple[float, ...]) -> float:
    """What the points (n, 2) dominate of the box below the reference, two objectives minimised."""
    inside = values[(values < reference).all(1)]
    total, height = 0.0, reference[1]
    for first, second in inside[np.lexsort((inside[:, 1], inside[:, 0]))]:
        if second < height:
            total += (reference[0] - first) * (height - second)
            height = second
    return total if math.isfinite(total) else 0.0
