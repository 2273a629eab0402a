"""Distributions over synthetic tasks, each with its exact or reference posterior."""

from priors.bnn import BNN as BNN
from priors.config import from_config as from_config
from priors.config import to_config as to_config
from priors.curves import LearningCurves as LearningCurves
from priors.gp import GaussianProcess as GaussianProcess
from priors.hebo import hebo_plus as hebo_plus
from priors.kernel_prior import KernelPrior as KernelPrior
from priors.linear import Linear as Linear
from priors.matching import match as match
from priors.mixture import Mixture as Mixture
from priors.nngp import NNGP as NNGP
from priors.ntk import WideEnsemble as WideEnsemble
from priors.optimization import optimization as optimization
from priors.parametric_curves import ParametricCurves as ParametricCurves
from priors.programs import from_pyro as from_pyro
from priors.reference import Marginal as Marginal
from priors.reference import nuts_posterior as nuts_posterior
from priors.scale_mixture import ScaleMixture as ScaleMixture
from priors.scales import BurrXII as BurrXII
from priors.searched import Searched as Searched
from priors.tasks import ConditionalPrior as ConditionalPrior
from priors.tasks import ConditionalTasks as ConditionalTasks
from priors.tasks import Prior as Prior
from priors.tasks import ReferencePrior as ReferencePrior
from priors.tasks import Tasks as Tasks
from priors.warped import Warped as Warped
