"""Structures, labelled data sets and trajectories: read, written and checked as `ase.Atoms`."""

from equimd.frames.checks import check_plausible, check_structure
from equimd.frames.labels import LabelKeys, UnitSpec, labels_of, require_labels, strip_labels
from equimd.frames.reading import Frames, PlausibilityWarning, read_frames, read_list

__all__ = [
    "Frames",
    "LabelKeys",
    "PlausibilityWarning",
    "UnitSpec",
    "check_plausible",
    "check_structure",
    "labels_of",
    "read_frames",
    "read_list",
    "require_labels",
    "strip_labels",
]
