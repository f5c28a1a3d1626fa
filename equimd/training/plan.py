"""How long a training is: what part of it is done, why it stops, and when its state is due."""

from equimd.training.recipe import Recipe
from equimd.training.sections import CheckpointSection
from equimd.training.state import Progress


def fraction_done(recipe: Recipe, p: Progress, hours: float, n_batches: int) -> float:
    """How much of the training is done, 0 to 1; drives the schedule. ``n_batches`` are those of the present epoch.

    It is the larger one of the parts of its length and of its budget of time; either may be all that a recipe has.
    """
    done = 0.0
    if recipe.steps is not None:
        done = p.step / recipe.steps
    elif recipe.epochs is not None:
        done = (p.epoch + p.batch / n_batches) / recipe.epochs
    if recipe.max_minutes is not None:
        done = max(done, hours * 60.0 / recipe.max_minutes)
    return min(1.0, done)


def why_stop(recipe: Recipe, p: Progress, hours: float, n_batches: int) -> str | None:
    """Why no further step is done; None where one is."""
    if recipe.steps is not None and p.step >= recipe.steps:
        return "finished"
    if recipe.epochs is not None and p.epoch + (p.batch == n_batches) >= recipe.epochs:
        return "finished"
    if recipe.max_minutes is not None and hours * 60.0 >= recipe.max_minutes:
        return "budget"
    return None


def goes_on(recipe: Recipe, p: Progress, hours: float) -> bool:
    """Whether a training that has stopped goes on at a resume: the recipe is longer now, or the budget larger."""
    if p.stopped == "finished":
        return p.step < (recipe.steps or 0) or p.epoch < (recipe.epochs or 0)
    if p.stopped == "budget":
        return recipe.max_minutes is None or hours * 60.0 < recipe.max_minutes
    return False


def is_stale(recipe: Recipe, p: Progress) -> bool:
    """Whether validations have been no better for as long as the recipe waits."""
    return recipe.early_stopping is not None and p.stale >= recipe.early_stopping.patience


def state_is_due(section: CheckpointSection, step: int, hours_since: float) -> bool:
    """Whether the state is written after this step."""
    if section.steps is not None and step % section.steps == 0:
        return True
    return section.minutes is not None and hours_since * 60.0 > section.minutes
