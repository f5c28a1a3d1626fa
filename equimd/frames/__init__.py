"""Structures, labelled data sets and trajectories: read, written and checked as `ase.Atoms`."""

from typing import TYPE_CHECKING

from equimd.frames.checks import check_plausible, check_structure
from equimd.frames.labels import LabelKeys, UnitSpec, labels_of, require_labels, strip_labels
from equimd.frames.reading import Frames, LossyWarning, PlausibilityWarning, read_frames, read_list
from equimd.frames.writing import write_frames

if TYPE_CHECKING:
    from equimd.frames.h5md import H5MDWriter

__all__ = [
    "Frames",
    "H5MDWriter",
    "LabelKeys",
    "LossyWarning",
    "PlausibilityWarning",
    "UnitSpec",
    "check_plausible",
    "check_structure",
    "labels_of",
    "read_frames",
    "read_list",
    "require_labels",
    "strip_labels",
    "write_frames",
]


def __getattr__(name: str):
    if name == "H5MDWriter":  # loads h5py, which most users of this package do not need
        from equimd.frames.h5md import H5MDWriter

        return H5MDWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
