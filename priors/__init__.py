"""Distributions over synthetic tasks, each with its exact or reference posterior."""

from priors.bnn import BNN as BNN
from priors.config import from_config as from_config
from priors.config import to_config as to_config
from priors.gp import GaussianProcess as GaussianProcess
from priors.reference import Marginal as Marginal
from priors.reference import nuts_posterior as nuts_posterior
from priors.tasks import ConditionalPrior as ConditionalPrior
from priors.tasks import ConditionalTasks as ConditionalTasks
from priors.tasks import Prior as Prior
from priors.tasks import ReferencePrior as ReferencePrior
from priors.tasks import Tasks as Tasks
