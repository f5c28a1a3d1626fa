"""The training loop: read from top to bottom."""

import copy
import math
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from equimd.errors import FailedError
from equimd.results import provenance
from equimd.training.batches import Batches, Epoch
from equimd.training.distributed import PeerLostError, ReportedElsewhere, StoppedError, World, join
from equimd.training.files import RunFolder, check_folder
from equimd.training.loggers import check_packages
from equimd.training.memory import OutOfMemoryError, advising
from equimd.training.objective import Objective, Tasks
from equimd.training.optim import WeightAverage, gradient_norm, make_optimizers, zero_gradients
from equimd.training.plan import fraction_done, goes_on, is_stale, state_is_due, why_stop
from equimd.training.precision import PrecisionError, PrecisionReport, matmul_precision, precision_error
from equimd.training.recipe import Recipe, load_recipe
from equimd.training.reporting import Reporter, describe, metrics_row
from equimd.training.result import SymmetrySummary, TrainingResult
from equimd.training.schedule import after_validation, learning_rate_factor, set_learning_rate
from equimd.training.setup import Setup, device_name, prepare, threads
from equimd.training.sharding import passes
from equimd.training.state import keep_former_defaults
from equimd.training.validation import evaluate, validate_symmetry

_PRECISION_FRAMES = 16


class TrainingDivergedError(FailedError):
    """The loss or its gradient is no longer finite."""


def train(
    recipe: Recipe | str | Path,
    run_dir: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    world: World | None = None,
) -> TrainingResult:
    """Train a potential as ``recipe`` says; everything is written to ``run_dir``, runs/<name> unless given.

    model.safetensors (the best average of the weights), last.safetensors, metrics.csv (a row per validation),
    state.safetensors (for a resume), result.json. With ``resume`` a training that was stopped at any moment continues
    from its last state; on the CPU, without max_minutes and with the same n_threads, every tensor is then equal bit
    for bit to that of a training that was never stopped. With max_minutes the clock of all sessions counts on, so that
    the schedule goes on where it was, but how many steps fit into the rest depends on the machine. The ledger of
    device-hours counts what led to the state.
    Processes that torchrun or srun started train together (``world``: they are joined already), on the batches that
    one process would take; a resume may have another number of them.

    Raises:
        InputError: bad recipe or data, a ``run_dir`` that exists (without ``resume``).
        StoppedError, PeerLostError, OutOfMemoryError: a signal, a dead process, no memory; the state is written first.
        TrainingDivergedError: the loss is not finite any more.
        FailedError: the disk is full; the last state is whole.
    """
    with ExitStack() as stack:
        world = world or stack.enter_context(join())
        with world.together():
            recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
            folder = Path("runs") / recipe.name if run_dir is None else Path(run_dir)
            recipe = keep_former_defaults(recipe, folder) if resume else recipe
            device = world.use_device(recipe.device)
            if world.is_first:
                check_folder(folder, resume)
                check_packages(recipe.logging)
        stack.enter_context(threads(recipe.n_threads))
        setup = world.first_then_others(
            lambda: prepare(recipe, device, progress and world.is_first)
        )  # bad input leaves no folder behind
        reporter = stack.enter_context(Reporter(recipe.name, progress and world.is_first))
        stack.enter_context(world.heeding_signals())
        return _Training(recipe, setup, folder, reporter, world).run()


class _Training:
    """One session of a training."""

    def __init__(self, recipe: Recipe, setup: Setup, folder: Path, reporter: Reporter, world: World) -> None:
        self.recipe, self.setup, self.reporter, self.world = recipe, setup, reporter, world
        self.objective = Objective(recipe, setup.potential)
        self.parameters = [p for p in setup.potential.parameters() if p.requires_grad] + self.objective.parameters
        self.optimizers = make_optimizers(setup.potential, recipe.optimizer) + self.objective.make_optimizers()
        self.average = WeightAverage(setup.potential, setup.average, recipe.ema)
        self.batches = Batches(recipe, setup.train, world)
        self.files = RunFolder(folder, setup, world, self.objective.modules, self.optimizers)
        self.progress, self.ledger = self.files.progress, self.files.ledger
        self.told = False  # that the machine does other work

    def run(self) -> TrainingResult:
        """Epochs until the recipe's end, then the test; what can be continued leaves its state behind."""
        p, recipe = self.progress, self.recipe
        if goes_on(recipe, p, self.ledger.hours):
            p.stopped = None
        self.files.open(recipe.logging)
        self.reporter.say(describe(recipe, self.setup, self.world, p.step))
        try:
            p.precision_start = p.precision_start or self.precision_error()
            if p.step == 0:
                self.files.save()  # there is no moment at which what lies in the folder cannot be continued
            while p.stopped is None:
                epoch = self.batches.epoch(p.epoch)
                while p.batch < len(epoch.batches) and self.why_stop(epoch) is None:
                    self.step(epoch)
                    self.reporter.advance(self.fraction(epoch), self.status)
                    if state_is_due(recipe.checkpoint, p.step, self.ledger.hours - self.files.saved_at):
                        self.files.save()
                # The state may be that of this very place, so what follows depends on the counters only.
                stop, epoch_is_done = self.why_stop(epoch), p.batch == len(epoch.batches)
                epochs = p.epoch + epoch_is_done
                if stop is not None or (epoch_is_done and epochs % recipe.validation.every == 0):
                    self.validate(self.fraction(epoch), epochs)
                p.epoch, p.batch = epochs, 0 if epoch_is_done else p.batch
                p.stopped = stop or ("early stopping" if is_stale(recipe, p) else None)
            return self.finish()
        except (StoppedError, PeerLostError, OutOfMemoryError, ReportedElsewhere):
            self.files.save_alone()  # no step has been done by half
            raise
        finally:
            self.files.close()

    def step(self, epoch: Epoch) -> None:
        """One step of the optimiser on the next batch, of which this process takes its part."""
        begin = time.monotonic()
        p, recipe, world = self.progress, self.recipe, self.world
        fraction = self.fraction(epoch)
        parts = [self.objective.tasks(g, f, p.epoch, p.step) for f, g in self.batches.passes(epoch, p.batch)]
        counts = [self.objective.counts(part) for part in parts]
        totals = self.ledger.agree(sum(counts, start=torch.zeros(5, dtype=torch.float64)))
        losses = torch.zeros(5, dtype=torch.float64)
        zero_gradients(self.parameters)
        with world.together(), matmul_precision(recipe.precision):
            for part, count in zip(parts, counts, strict=True):
                losses += self.add_gradient(part, fraction, count / totals.clamp(min=1))
        losses = world.sum_gradients(self.parameters, losses)
        norm = float(gradient_norm(self.parameters, recipe.optimizer.gradient_clip))
        if not math.isfinite(norm):
            raise world.same_everywhere(self.diverged(norm))
        factor = learning_rate_factor(recipe.schedule, p.step, fraction, p.reduced)
        p.lr = set_learning_rate(self.optimizers, factor * self.objective.learning_rate_factor(fraction))
        for optimizer in self.optimizers:
            optimizer.step()
        p.step, p.batch = p.step + 1, p.batch + 1
        self.average.update(p.step)
        p.sums = [s + loss for s, loss in zip(p.sums, losses.tolist(), strict=True)]
        p.n_sums = [n + bool(loss) for n, loss in zip(p.n_sums, losses, strict=True)]  # zero is without labels
        self.ledger.stepped(time.monotonic() - begin, len(epoch.batches[p.batch - 1]) * self.batches.copies)

    def add_gradient(self, part: Tasks, fraction: float, shares: Tensor) -> Tensor:
        """Add the gradient of a part's share of the loss; returns its shares of the loss and its terms (5,)."""
        with advising("batch.max_edges_per_pass", f"at step {self.progress.step}", *part.graphs):
            loss = self.objective.loss(part, fraction, shares)
            if loss.total.requires_grad:  # not where there are no labels
                loss.total.backward()
        terms = torch.stack([term.detach() for term in loss]).to("cpu", torch.float64)
        return torch.cat([terms[:1], shares[:4] * terms[1:]])

    def validate(self, fraction: float, epochs: int) -> None:
        """Errors of the averaged weights; the best are kept as model.safetensors."""
        p, setup, world, section = self.progress, self.setup, self.world, self.recipe.validation
        world.check_in_step(setup.potential, p.step)
        errors = evaluate(setup.average, setup.valid, setup.stress, world, section.max_edges)
        symmetry = validate_symmetry(setup.average, setup.valid, section, world)
        before, value = p.model_copy(), errors.metric(section.metric)
        improved = p.best is None or value < p.best or math.isnan(p.best)
        if improved:
            p.best, p.best_step = value, p.step
        better = improved or self.objective.pretrains(fraction)  # until its end, gradients are not what is trained
        p.stale = 0 if better else p.stale + 1
        after_validation(self.recipe.schedule, p, better)
        row = metrics_row(p, epochs, errors, symmetry, self.ledger)
        try:
            self.files.write_row(row, improved)
        except BaseException:
            p.become(before)  # a resume repeats the validation
            raise
        p.sums, p.n_sums = [0.0] * 5, [0] * 5
        self.reporter.validated(fraction, row)
        if (told := self.ledger.other_work()) is not None and not self.told:
            self.told = True
            self.reporter.say(f"the machine does other work: {told}; hours are an upper bound, frames/s a lower one")

    def finish(self) -> TrainingResult:
        """Save everything, test the best weights, write result.json."""
        p, recipe, setup, world = self.progress, self.recipe, self.setup, self.world
        self.files.save()
        best = copy.deepcopy(setup.average)
        self.files.load_best(best)
        precision, max_edges = None, recipe.validation.max_edges
        if p.precision_start is not None and (end := self.precision_error()) is not None:
            precision = PrecisionReport(setting=recipe.precision, start=p.precision_start, end=end)
        result = TrainingResult(
            name=recipe.name,
            family=best.family,
            stopped=p.stopped,  # type: ignore[arg-type]
            steps=p.step,
            epochs=p.epoch,
            best_step=p.best_step,
            n_parameters=sum(q.numel() for q in best.parameters()),
            batch=recipe.batch,
            learning_rate=recipe.optimizer.lr,
            muon_learning_rate=recipe.optimizer.muon_lr,
            device=device_name(setup.device),
            n_devices=world.size,
            valid=evaluate(best, setup.valid, setup.stress, world, max_edges),
            test=None if setup.test is None else evaluate(best, setup.test, setup.stress, world, max_edges),
            symmetry=SymmetrySummary.of(validate_symmetry(best, setup.valid, recipe.validation, world)),
            precision=precision,
            hours=self.ledger.now(),
            device_hours=self.ledger.device_hours,
            cpu_hours=self.ledger.cpu_hours,
            shared=self.ledger.shared,
            frames_per_s=self.ledger.frames_per_s(),
            sessions=p.sessions,
            versions=provenance().versions,
        )
        self.files.write_result(best, result)
        return result

    def status(self) -> str:
        """Where the training is, between validations."""
        p, speed = self.progress, self.ledger.frames_per_s()
        loss = f"loss {p.sums[0] / p.n_sums[0]:.4g}" if p.n_sums[0] else "no loss yet"
        return f"step {p.step} epoch {p.epoch}: {loss}" + (f", {speed:.3g} frames/s" if speed else "")

    def fraction(self, epoch: Epoch) -> float:
        """How much of the training is done, 0 to 1."""
        return fraction_done(self.recipe, self.progress, self.ledger.hours, len(epoch.batches))

    def why_stop(self, epoch: Epoch) -> str | None:
        """Why no further step is done; None where one is."""
        return why_stop(self.recipe, self.progress, self.ledger.hours, len(epoch.batches))

    def precision_error(self) -> PrecisionError | None:
        """What the recipe's precision does to the present weights, on frames of the validation set."""
        if self.recipe.precision == "float32":
            return None
        valid = self.setup.valid
        first = passes(valid.n_edges[:_PRECISION_FRAMES].cpu().numpy(), self.recipe.validation.max_edges)[0]
        graph = valid.batch(torch.from_numpy(first).to(self.setup.device))
        with self.world.together(), advising("validation.max_edges", "in the check of the precision", graph):
            error = precision_error(self.setup.potential, graph, self.recipe.precision)
        self.reporter.say(
            f"{self.recipe.precision} products change forces by {error.forces:.2g} and their gradient by"
            f" {error.gradient:.2g} (relative RMS, {graph.n_systems} validation frames)"
        )
        return error

    def diverged(self, norm: float) -> TrainingDivergedError:
        """What to say where the gradient is not finite."""
        return TrainingDivergedError(
            f"the gradient is {norm} at step {self.progress.step}; lower optimizer.lr"
            f" ({self.recipe.optimizer.lr:g}) or optimizer.gradient_clip, or look for frames with huge forces"
        )
