"""One of two processes that train together: every recipe of a folder in turn; what came of each goes to a JSON file.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python two_processes.py FOLDER

What is done besides, by the name of the recipe, is below.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from equimd.training import loop, train
from equimd.training.loop import _Training

RANK = int(os.environ["RANK"])
step, add_gradient, validate = _Training.step, _Training.add_gradient, _Training.validate


def signalled(self, epoch):
    if self.progress.step == 7 and RANK == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    step(self, epoch)


def without_memory(self, part, *rest):
    if self.progress.step == 7 and RANK == 1:
        with loop.advising("batch.max_edges_per_pass", "here", part.usual):
            raise torch.OutOfMemoryError("CUDA out of memory")
    return add_gradient(self, part, *rest)


def diverging(self, *arguments):
    losses = add_gradient(self, *arguments)
    if self.progress.step == 7 and RANK == 1:
        self.parameters[0].grad[0] = float("nan")
    return losses


def out_of_step(self, *arguments):
    if RANK == 1:
        with torch.no_grad():
            self.parameters[0].flatten()[0] += 1e-12
    validate(self, *arguments)


def local_share(self, part, fraction, shares):
    """Means over the labels of a process, as if they were as many everywhere: wrong."""
    return add_gradient(self, part, fraction, torch.where(shares > 0, 0.5, 0.0))


PATCHES = {
    "signalled": (_Training, "step", signalled),
    "memory": (_Training, "add_gradient", without_memory),
    "diverging": (_Training, "add_gradient", diverging),
    "out_of_step": (_Training, "validate", out_of_step),
    "wrong": (_Training, "add_gradient", local_share),
}


def run(recipe: Path) -> str:
    place, name, patch = PATCHES.get(recipe.stem, (_Training, "step", step))
    before = getattr(place, name)
    setattr(place, name, patch)
    try:
        train(recipe, recipe.with_suffix(""), progress=False)
        return "finished"
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        setattr(place, name, before)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    outcome = {recipe.stem: run(recipe) for recipe in sorted(folder.glob("*.yaml"))}
    (folder / f"outcome-{RANK}.json").write_text(json.dumps(outcome))
