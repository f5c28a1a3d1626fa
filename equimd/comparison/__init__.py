"""The main job: potentials run side by side on one structure, their frames labelled, their errors and costs measured.

``contestants`` says who is compared, ``folder`` where files go and what a resumed comparison finds there, ``job`` runs
and labels, ``measure`` measures, and ``run`` puts them together.
"""

from equimd.comparison.contestants import DEFAULT_PAIR, start_structure
from equimd.comparison.run import StoppedWarning, compare

__all__ = ["DEFAULT_PAIR", "StoppedWarning", "compare", "start_structure"]
