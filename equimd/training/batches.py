"""From the global batches of an epoch to the graphs that one process computes."""

from typing import NamedTuple

import numpy as np
import torch

from equimd.graph import AtomGraph
from equimd.training.augment import epoch_rotations, rotate_graph
from equimd.training.data import FrameSet, epoch_batches
from equimd.training.distributed import World
from equimd.training.recipe import Recipe
from equimd.training.sharding import balanced_parts, passes


class Epoch(NamedTuple):
    """The frames of each global batch, and the rotations (S, copies, 3, 3) of all frames, None without any."""

    batches: list[np.ndarray]
    rotations: np.ndarray | None


class Batches:
    """Batches of a training set; they follow from (seed, epoch) and are the same for any number of processes."""

    def __init__(self, recipe: Recipe, frames: FrameSet, world: World) -> None:
        self.recipe, self.frames, self.world = recipe, frames, world
        self.n_edges = frames.n_edges.cpu().numpy()
        self.copies = recipe.augmentation.copies if recipe.rotates else 1

    def epoch(self, number: int) -> Epoch:
        """What epoch ``number`` consists of."""
        recipe, rotations = self.recipe, None
        if recipe.rotates:
            inversion = recipe.augmentation.inversion
            rotations = epoch_rotations(len(self.n_edges), self.copies, recipe.seed, number, inversion)
        return Epoch(epoch_batches(self.n_edges, recipe.batch, recipe.seed, number), rotations)

    def passes(self, epoch: Epoch, batch: int) -> list[tuple[np.ndarray, AtomGraph]]:
        """Frames and graphs of this process's part of a batch, as it is computed; empty where it has no frame."""
        frames = epoch.batches[batch]
        part = frames[balanced_parts(self.n_edges[frames], self.world.size)[self.world.rank]]
        parts = []
        for places in passes(self.n_edges[part] * self.copies, self.recipe.batch.max_edges_per_pass):
            chosen = part[places]
            graph = self.frames.batch(torch.from_numpy(np.repeat(chosen, self.copies)))
            if epoch.rotations is not None:
                rotations = torch.from_numpy(epoch.rotations[chosen].reshape(-1, 3, 3))
                graph = rotate_graph(graph, rotations.to(self.frames.device))
            parts.append((chosen, graph))
        return parts
