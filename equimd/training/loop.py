"""The training loop: read from top to bottom."""

import math
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from equimd.errors import InputError
from equimd.models.checkpoint import MODEL_FILE, load_checkpoint, save_checkpoint
from equimd.results import Block, Result, provenance
from equimd.training.augment import epoch_rotations, rotate_graph
from equimd.training.data import epoch_batches
from equimd.training.objective import Objective
from equimd.training.optim import WeightAverage, gradient_norm, make_optimizers, zero_gradients
from equimd.training.recipe import Recipe, load_recipe
from equimd.training.reporting import MetricsFile, Reporter
from equimd.training.schedule import after_validation, learning_rate_factor, set_learning_rate
from equimd.training.setup import Setup, device_name, prepare, threads
from equimd.training.state import Progress, read_state, write_state
from equimd.training.validation import Errors, evaluate, validate_symmetry

LAST_FILE = "last.safetensors"
RESULT_FILE = "result.json"


class TrainingDivergedError(RuntimeError):
    """The loss or its gradient is no longer finite."""


class SymmetrySummary(Block):
    """L_mean and L_equiv in (eV/Å)² on validation frames; null without force labels."""

    l_mean: float | None
    l_equiv: float
    percent_of_loss: float | None


class TrainingResult(Result):
    """A finished training: errors of the best average of the weights, and what it cost."""

    name: str
    family: str
    stopped: Literal["finished", "early stopping", "budget"]
    steps: int
    epochs: float
    best_step: int
    n_parameters: int
    device: str
    device_hours: float
    sessions: int
    valid: Errors
    test: Errors | None
    symmetry: SymmetrySummary | None
    versions: dict[str, str]


def train(
    recipe: Recipe | str | Path, run_dir: str | Path | None = None, resume: bool = False, progress: bool = True
) -> TrainingResult:
    """Train a potential as ``recipe`` says; everything is written to ``run_dir``, runs/<name> unless given.

    model.safetensors (the best average of the weights), last.safetensors, metrics.csv (a row per validation),
    state.safetensors (for a resume), result.json. With ``resume`` a training that was killed at any moment continues
    from its last state; on the CPU, without max_minutes and with the same n_threads, every tensor is then equal bit
    for bit to that of a training that was never killed. The ledger of device-hours counts what led to the state.

    Raises:
        InputError: bad recipe or data, a ``run_dir`` that exists (without ``resume``), a full disk.
        TrainingDivergedError: the loss is not finite any more.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    folder = Path("runs") / recipe.name if run_dir is None else Path(run_dir)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; accepted is a folder that does not exist yet")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists already; give another folder, or resume to continue what is in it")
    with threads(recipe.n_threads):
        setup = prepare(recipe, progress)  # before the folder is made, so that bad input leaves nothing behind
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make {folder}: {error.strerror}") from error
        with Reporter(recipe.name, progress) as reporter:
            return _Training(recipe, setup, folder, reporter).run()


class _Training:
    """One session of a training."""

    def __init__(self, recipe: Recipe, setup: Setup, folder: Path, reporter: Reporter) -> None:
        self.recipe, self.setup, self.folder, self.reporter = recipe, setup, folder, reporter
        self.objective = Objective(recipe, setup.potential)
        self.parameters = [p for p in setup.potential.parameters() if p.requires_grad] + self.objective.parameters
        self.optimizers = make_optimizers(setup.potential, recipe.optimizer) + self.objective.make_optimizers()
        self.average = WeightAverage(setup.potential, setup.average, recipe.ema)
        self.modules = {"weights": setup.potential, "average": setup.average, **self.objective.modules}
        self.progress = read_state(folder, setup.identity, self.modules, self.optimizers) or Progress()
        self.metrics = MetricsFile(folder, self.progress.rows)
        self.n_edges = setup.train.n_edges.cpu().numpy()
        self.hours_before = self.progress.device_hours
        self.fraction_before: float | None = None
        self.started = self.saved = time.monotonic()
        self.train_seconds, self.train_frames = 0.0, 0
        self.progress.sessions += 1

    def run(self) -> TrainingResult:
        """Epochs until the recipe's end, then the test."""
        p, recipe = self.progress, self.recipe
        if p.stopped == "finished" and (p.step < (recipe.steps or 0) or p.epoch < (recipe.epochs or 0)):
            p.stopped = None  # the recipe has become longer
        while p.stopped is None:
            batches = epoch_batches(self.n_edges, recipe.batch, recipe.seed, p.epoch)
            rotations = self._rotations(p.epoch)
            while p.batch < len(batches) and self._why_stop(len(batches)) is None:
                self.step(batches[p.batch], rotations, self.fraction(len(batches)))
                p.batch += 1
                self.reporter.advance(self.fraction(len(batches)))
                if self._state_is_due():
                    self.save()
            # The state may be that of this very place, so what follows depends on the counters only.
            stop, fraction = self._why_stop(len(batches)), self.fraction(len(batches))
            if p.batch == len(batches):
                p.epoch, p.batch = p.epoch + 1, 0
            if stop is not None or (p.batch == 0 and p.epoch % recipe.validation.every == 0):
                self.validate(fraction)
            patience = recipe.early_stopping.patience if recipe.early_stopping else math.inf
            p.stopped = stop or ("early stopping" if p.stale >= patience else None)
        return self.finish()

    def step(self, frames: np.ndarray, rotations: np.ndarray | None, fraction: float) -> None:
        """One step of the optimiser on the frames of a batch."""
        begin = time.monotonic()
        p, recipe = self.progress, self.recipe
        copies = recipe.augmentation.copies if rotations is not None else 1
        device = self.setup.device
        graph = self.setup.train.batch(torch.from_numpy(np.repeat(frames, copies)).to(device))
        if rotations is not None:
            graph = rotate_graph(graph, torch.from_numpy(rotations[frames].reshape(-1, 3, 3)).to(device))
        loss = self.objective(graph, frames, p.epoch, p.step, fraction)
        zero_gradients(self.parameters)
        loss.total.backward()
        norm = gradient_norm(self.parameters, recipe.optimizer.gradient_clip)
        if not math.isfinite(norm):
            raise TrainingDivergedError(
                f"the gradient is {norm} at step {p.step}; lower optimizer.lr ({recipe.optimizer.lr:g}) or"
                " optimizer.gradient_clip, or look for frames with huge forces"
            )
        factor = learning_rate_factor(recipe.schedule, p.step, fraction, p.reduced)
        p.lr = set_learning_rate(self.optimizers, factor * self.objective.learning_rate_factor(fraction))
        for optimizer in self.optimizers:
            optimizer.step()
        p.step += 1
        self.average.update(p.step)
        p.sums = [s + float(term.detach()) for s, term in zip(p.sums, loss, strict=True)]
        p.n_sums = [n + bool(term) for n, term in zip(p.n_sums, loss, strict=True)]  # zero is without labels
        p.frames_seen += len(frames) * copies
        self.train_seconds += time.monotonic() - begin
        self.train_frames += len(frames) * copies

    def validate(self, fraction: float) -> None:
        """Errors of the averaged weights; the best are kept as model.safetensors."""
        p, recipe, setup = self.progress, self.recipe, self.setup
        errors = evaluate(setup.average, setup.valid, setup.stress)
        symmetry = validate_symmetry(setup.average, setup.valid, recipe.validation)
        value = errors.metric(recipe.validation.metric)
        improved = p.best is None or value < p.best or math.isnan(p.best)
        if improved:
            p.best, p.best_step = value, p.step
            save_checkpoint(self.folder / MODEL_FILE, setup.average, self.header())
        better = improved or self.objective.pretrains(fraction)  # until its end, gradients are not what is trained
        p.stale = 0 if better else p.stale + 1
        after_validation(recipe.schedule, p, better)
        mean = [s / n if n else None for s, n in zip(p.sums, p.n_sums, strict=True)]
        rmse = [None if m is None else math.sqrt(m) for m in mean]
        row = {
            "step": p.step,
            "epoch": p.epoch,
            "lr": p.lr,
            "train_loss": mean[0],
            "train_energy_rmse_meV_per_atom": _scaled(rmse[1]),
            "train_force_rmse_meV_per_A": _scaled(rmse[2]),
            "train_stress_rmse_meV_per_A3": _scaled(rmse[3]),
            "train_noise_rmse": rmse[4],
            "valid_energy_mae_meV_per_atom": _scaled(errors.energy_per_atom_mae),
            "valid_energy_rmse_meV_per_atom": _scaled(errors.energy_per_atom_rmse),
            "valid_force_mae_meV_per_A": _scaled(errors.force_mae),
            "valid_force_rmse_meV_per_A": _scaled(errors.force_rmse),
            "device_hours": self.device_hours(),
            "frames_per_s": self.train_frames / self.train_seconds if self.train_seconds else None,
            **({} if symmetry is None else symmetry._asdict()),
        }
        self.metrics.append(row)
        p.sums, p.n_sums, p.rows = [0.0] * 5, [0] * 5, p.rows + 1
        self.train_seconds, self.train_frames = 0.0, 0
        self.reporter.validated(fraction, {**row, "minutes_left": self._minutes_left(fraction)})

    def finish(self) -> TrainingResult:
        """Save everything, test the best weights, write result.json."""
        p, setup = self.progress, self.setup
        self.save()
        best, _ = load_checkpoint(self.folder / MODEL_FILE, setup.device, self.recipe.dtype)
        symmetry = validate_symmetry(best, setup.valid, self.recipe.validation)
        result = TrainingResult(
            name=self.recipe.name,
            family=best.family,
            stopped=p.stopped,  # type: ignore[arg-type]
            steps=p.step,
            epochs=p.epoch,
            best_step=p.best_step,
            n_parameters=sum(q.numel() for q in best.parameters()),
            device=device_name(setup.device),
            device_hours=self.device_hours(),
            sessions=p.sessions,
            valid=evaluate(best, setup.valid, setup.stress),
            test=None if setup.test is None else evaluate(best, setup.test, setup.stress),
            symmetry=None
            if symmetry is None
            else SymmetrySummary(
                l_mean=_known(symmetry.l_mean),
                l_equiv=symmetry.l_equiv,
                percent_of_loss=_known(symmetry.percent_of_loss),
            ),
            versions=provenance().versions,
        )
        errors = {"valid": result.valid.model_dump(), "test": result.test and result.test.model_dump()}
        save_checkpoint(self.folder / MODEL_FILE, best, {**self.header(), "errors": errors})
        result.write(self.folder / RESULT_FILE)
        return result

    def save(self) -> None:
        """Write last.safetensors and the state."""
        self.saved = time.monotonic()
        self.progress.device_hours = self.device_hours()
        save_checkpoint(self.folder / LAST_FILE, self.setup.average, self.header())
        write_state(self.folder, self.progress, self.setup.identity, self.modules, self.optimizers)

    def header(self) -> dict[str, Any]:
        """The checkpoints' header, with the ledger as it stands."""
        p = self.progress
        ledger = {
            "device": device_name(self.setup.device),
            "n_devices": 1,
            "n_threads": torch.get_num_threads(),
            "device_hours": self.device_hours(),
            "sessions": p.sessions,
            "steps": p.step,
            "epochs": p.epoch,
            "frames_seen": p.frames_seen,
            "best_step": p.best_step,
        }
        return {**self.setup.header, "ledger": ledger}

    def device_hours(self) -> float:
        """Wall-clock hours of one device, over all sessions; validations included."""
        return self.hours_before + (time.monotonic() - self.started) / 3600.0

    def fraction(self, n_batches: int) -> float:
        """How much of the training is done, 0 to 1; drives the schedule."""
        p, recipe = self.progress, self.recipe
        if recipe.steps is not None:
            done = p.step / recipe.steps
        else:
            assert recipe.epochs is not None
            done = (p.epoch + p.batch / n_batches) / recipe.epochs
        if recipe.max_minutes is not None:
            done = max(done, self.device_hours() * 60.0 / recipe.max_minutes)
        return min(1.0, done)

    def _why_stop(self, n_batches: int) -> str | None:
        p, recipe = self.progress, self.recipe
        if recipe.steps is not None and p.step >= recipe.steps:
            return "finished"
        if recipe.epochs is not None and p.epoch == recipe.epochs - 1 and p.batch == n_batches:
            return "finished"
        if recipe.max_minutes is not None and self.device_hours() * 60.0 >= recipe.max_minutes:
            return "budget"
        return None

    def _rotations(self, epoch: int) -> np.ndarray | None:
        if not self.recipe.rotates:
            return None
        section = self.recipe.augmentation
        return epoch_rotations(len(self.n_edges), section.copies, self.recipe.seed, epoch, section.inversion)

    def _state_is_due(self) -> bool:
        section = self.recipe.checkpoint
        if section.steps is not None and self.progress.step % section.steps == 0:
            return True
        return section.minutes is not None and time.monotonic() - self.saved > 60.0 * section.minutes

    def _minutes_left(self, fraction: float) -> float | None:
        if self.fraction_before is None:
            self.fraction_before, self.started_at = fraction, time.monotonic()
            return None
        done = fraction - self.fraction_before
        return (time.monotonic() - self.started_at) / 60.0 * (1.0 - fraction) / done if done > 0 else None


def _scaled(value: float | None) -> float | None:
    return None if value is None else 1000.0 * value


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
