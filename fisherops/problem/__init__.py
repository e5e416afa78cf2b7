"""A model with its likelihood and parameters: how it is evaluated and differentiated, and when it has changed."""

from fisherops.problem.evaluation import Evaluation
from fisherops.problem.parameters import Parameters
from fisherops.problem.problem import Problem

__all__ = ["Evaluation", "Parameters", "Problem"]
