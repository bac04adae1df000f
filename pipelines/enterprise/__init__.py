"""A simulated enterprise: days of flows of a few hundred hosts in minutes of CPU, with the truth about what is wrong.

It is what `make evaluate` and the notebooks use where a real network with labels is not to be had. Its figures say how
parts compare with each other; they are no proof for any real network, whose habits are stranger than ours here.
"""

from flowsage.pipelines.enterprise.attacks import ATTACKS, Scene
from flowsage.pipelines.enterprise.flows import Flows
from flowsage.pipelines.enterprise.simulate import Simulation, simulate

__all__ = ["ATTACKS", "Flows", "Scene", "Simulation", "simulate"]
