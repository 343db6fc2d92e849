"""People of our own making talk to the real server, vote, and change their minds: does the loop learn?"""

from alignfast.simulation.run import SimulationConfig, simulate

__all__ = ["SimulationConfig", "simulate"]
