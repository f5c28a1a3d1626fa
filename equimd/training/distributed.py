"""Several processes that train one potential: who they are, what they add up, and how they end together.

Training is data-parallel: each process holds the whole network, takes its part of every global batch, and adds its
gradient to that of the others in ONE all_reduce of all gradients laid end to end. At 0.1 to 10 million parameters that
is one message of at most tens of megabytes, so there is nothing to gain from DistributedDataParallel's buckets, which
overlap with the pass back; and its hooks are on an nn.Module's ``forward``, while training asks for
``predict_trainable``, a function of autograd with a gradient of its own. Sums of gradients and global counts of labels
(``loss.shared``) are all that one process would have done, so results do not depend on the number of processes.

Numbers of the control flow go over gloo, gradients on GPUs over NCCL. One process needs no torch.distributed at all.
"""

import atexit
import os
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from equimd.errors import FailedError, InputError
from equimd.training.lifeline import Lifeline

T = TypeVar("T")
_JOIN = timedelta(minutes=5)
_FOREVER = timedelta(days=7)  # a death is noticed by the lifeline; reading a million frames may take its time
_LOST = "another process of this training is gone; continue with --resume, on as many processes as you like"
_SECONDS_TO_TELL = 5.0


class PeerLostError(FailedError):
    """Another process of the training died."""


class StoppedError(FailedError):
    """A signal asked the training to stop."""


class ReportedElsewhere(SystemExit):
    """Ends this process without a word: another one says why."""

    def __init__(self) -> None:
        super().__init__(1)


@dataclass(frozen=True)
class Place:
    """What the environment says of this process: ``rank`` of ``size``, and where process 0 listens."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 29_500
    launcher: str = "torchrun"


def find_place(environment: Mapping[str, str]) -> Place:
    """Our place from the variables of torchrun (RANK, WORLD_SIZE, ...) or, without them, of SLURM's srun.

    SLURM_NTASKS alone makes no world: a batch script has it as well, and is one process.

    Raises:
        InputError: for variables that are no numbers, or that do not fit together.
    """
    e = environment
    if "RANK" in e and "WORLD_SIZE" in e:
        local = _integer(e, "LOCAL_RANK", _integer(e, "SLURM_LOCALID", 0))
        place = Place(_integer(e, "RANK"), _integer(e, "WORLD_SIZE"), local)
        names = ("RANK", "WORLD_SIZE")
    else:
        tasks = "SLURM_STEP_NUM_TASKS"
        if "SLURM_PROCID" not in e or tasks not in e:
            return Place()
        # Jobs that share a node, and steps of a job, get ports of their own.
        port = 20_000 + (_integer(e, "SLURM_JOB_ID", 0) + 1009 * _integer(e, "SLURM_STEP_ID", 0)) % 10_000
        place = Place(
            _integer(e, "SLURM_PROCID"), _integer(e, tasks), _integer(e, "SLURM_LOCALID", 0), _slurm_host(e), port
        )
        place = Place(**{**vars(place), "launcher": "srun"})
        names = ("SLURM_PROCID", tasks)
    if not 0 <= place.rank < place.size:
        raise InputError(f"{names[0]} is {place.rank} of {names[1]} {place.size}; accepted is 0 to {place.size - 1}")
    host, port = e.get("MASTER_ADDR", place.host), _integer(e, "MASTER_PORT", place.port)
    return Place(**{**vars(place), "host": host, "port": port})


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise InputError(f"the environment variable {name} is {text!r}; accepted is an integer") from None


def _slurm_host(e: Mapping[str, str]) -> str:
    """The node of task 0: the first of a list such as ``gpu[003-006,9],login1``."""
    if e.get("SLURM_STEP_NUM_NODES", e.get("SLURM_NNODES")) == "1":
        return "127.0.0.1"
    nodes = e.get("SLURM_STEP_NODELIST") or e.get("SLURM_NODELIST") or e.get("SLURM_JOB_NODELIST") or ""
    match = re.match(r"([^\[,]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        return e.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    return "".join(part or "" for part in match.groups())


@dataclass
class World:
    """This process, ``rank`` of ``size``, and what it does together with the others; alone, all of it is trivial."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    lifeline: Lifeline | None = None
    signal: str | None = None
    """The name of a signal that has asked this process to stop."""

    @property
    def is_first(self) -> bool:
        """Whether it is this process that writes files and speaks."""
        return self.rank == 0

    def use_device(self, name: str) -> torch.device:
        """The device of a recipe, here: with several processes, each takes the GPU of its number on this machine."""
        cuda = torch.cuda.is_available()
        if name == "auto":
            name = "cuda" if cuda else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise InputError(f"device is {name!r}; accepted are auto, cpu, cuda, cuda:<index>") from error
        if device.type == "cuda" and not cuda:
            raise InputError(f"device is {name!r} but there is no CUDA device here; cpu is accepted")
        if device.type == "cuda" and self.size > 1:
            if device.index is not None:
                raise InputError(f"device is {name!r} for {self.size} processes; accepted are auto, cuda, cpu")
            # srun may show each of its tasks a single GPU.
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
        self.device = device
        return device

    # --- what goes to the others --------------------------------------------------------------------------------------

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes of a small tensor, on the CPU."""
        if self.size == 1:
            return values
        return self._all_reduce(values.detach().to("cpu", copy=True))

    def sum_gradients(self, parameters: list[nn.Parameter], beside: Tensor) -> Tensor:
        """Replace the gradients by their sums over processes, in one message; returns that of ``beside`` (n,) too.

        A parameter that has no gradient anywhere keeps none.
        """
        if self.size == 1:
            return beside
        flags = [float(p.grad is not None) for p in parameters]
        parts = [p.detach().new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in parameters]
        parts += [parts[0].new_tensor(flags), beside.to(parts[0])]
        *gradients, used, beside = self._all_reduce(torch.cat(parts)).split([len(part) for part in parts])
        for p, gradient, is_used in zip(parameters, gradients, used.tolist(), strict=True):
            p.grad = gradient.view_as(p) if is_used else None
        return beside

    def broadcast(self, module: nn.Module) -> None:
        """Give every process the tensors of process 0's module."""
        if self.size == 1:
            return
        tensors = [t for t in module.state_dict().values() if t.is_floating_point()]
        flat = torch.cat([t.detach().flatten().double().cpu() for t in tensors])
        flat = self._all_reduce(flat if self.is_first else torch.zeros_like(flat))
        with torch.no_grad():
            for tensor, values in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(values.view_as(tensor))

    def check_in_step(self, module: nn.Module, step: int) -> None:
        """Fail unless all processes hold the same weights, bit for bit."""
        if self.size == 1:
            return
        weights = [p.detach().double() for p in module.parameters()]
        own = torch.stack([sum((w.pow(k).sum() for w in weights), start=torch.zeros(())) for k in (1, 2)]).cpu()
        import torch.distributed as dist

        largest = self._all_reduce(torch.cat([own, -own]), dist.ReduceOp.MAX)
        if not torch.equal(largest[:2], -largest[2:]):
            raise self.same_everywhere(
                FailedError(
                    f"the processes hold different weights at step {step}; they need the same equimd, torch, data and"
                    " kind of processor"
                )
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one process ends all of them after it, and the first that failed says why.

        Nothing inside may wait for another process.
        """
        if self.size == 1:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except Exception as error:
            problem = error
        import torch.distributed as dist

        own = torch.tensor([self.size if problem is None else self.rank])
        first = int(self._all_reduce(own, dist.ReduceOp.MIN))
        if first < self.size:
            self._expect_end()
            raise problem if problem is not None and first == self.rank else ReportedElsewhere

    def first_then_others(self, action: Callable[[], T]) -> T:
        """The result of an action that process 0 does first, and the others then, who find what it has stored."""
        result: list[T] = []
        for turn in (True, False):
            with self.together(), warnings.catch_warnings():
                if not self.is_first:
                    warnings.simplefilter("ignore")  # once is enough
                if self.is_first == turn:
                    result.append(action())
        return result[0]

    def same_everywhere(self, error: Exception) -> BaseException:
        """What to raise where every process has found the same ``error``: only the first reports it."""
        self._expect_end()
        return error if self.is_first else ReportedElsewhere()

    def wait(self) -> None:
        """Until every process is here."""
        self.sum(torch.zeros(1))

    def _all_reduce(self, tensor: Tensor, operation: Any = None) -> Tensor:
        """The reduced tensor, in its own memory; a broken connection means that a process is gone."""
        import torch.distributed as dist

        try:
            dist.all_reduce(tensor, operation or dist.ReduceOp.SUM, group=self.group)
        except RuntimeError as error:
            raise self._lost(str(error)) from error
        return tensor

    def _lost(self, why: str) -> BaseException:
        verdict = self.lifeline.wait_for_verdict(_SECONDS_TO_TELL) if self.lifeline else None
        self._expect_end()
        if verdict is None:
            return FailedError(f"the processes of this training could not exchange numbers: {why}")
        return PeerLostError(_LOST) if verdict == "lost" else ReportedElsewhere()

    def _expect_end(self) -> None:
        if self.lifeline is not None:
            self.lifeline.expect_end()

    # --- what comes from outside --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise where a signal has asked this process to stop, or where another process is gone."""
        if self.lifeline is not None and self.lifeline.verdict is not None:
            raise self._lost("")
        if self.signal is not None:
            raise self.stopped()

    def stopped(self, step: int | None = None) -> StoppedError:
        """What to raise where a signal has asked to stop."""
        where = "" if step is None else f" after step {step}"
        return StoppedError(f"stopped by {self.signal}{where}; the state is written, continue with --resume")

    @contextmanager
    def heeding_signals(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT instead of dying of them; ``check`` tells. A second Ctrl-C interrupts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        first: list[float] = []

        def note(number: int, _: FrameType | None) -> None:
            # torchrun repeats the signal that the terminal sends to all of its processes.
            if number == signal.SIGINT and first and time.monotonic() - first[0] > 2.0:
                raise KeyboardInterrupt
            first.append(time.monotonic())
            self.signal = signal.Signals(number).name

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def join(environment: Mapping[str, str] | None = None) -> Iterator[World]:
    """The processes that torchrun or srun started, connected; a world of one where there are no others.

    Raises:
        FailedError: when the others do not come within five minutes.
    """
    place = find_place(os.environ if environment is None else environment)
    if place.size == 1:
        yield World()
        return
    world = World(place.rank, place.size, place.local_rank, group=_connect(place))

    def share(value: Any) -> Any:
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=world.group, device=torch.device("cpu"))
        return box[0]

    try:
        world.lifeline = Lifeline(place.rank, place.size, place.host, share, f"equimd: error: {_LOST}")
        yield world
        world._expect_end()
        world.wait()
    finally:
        if world.lifeline is not None:
            world.lifeline.close()


def _connect(place: Place) -> Any:
    """The process group; it lives as long as the process, since torchrun's store knows each process once."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        method = "env://" if place.launcher == "torchrun" else f"tcp://{place.host}:{place.port}"
        try:
            dist.init_process_group(backend, method, _JOIN, place.size, place.rank)
        except (RuntimeError, ValueError) as error:
            raise FailedError(
                f"process {place.rank} waited in vain for {place.size} processes at {place.host}:{place.port}; start"
                f" all of them with {place.launcher} ({' '.join(str(error).split())[:200]})"
            ) from error
        if "nccl" in backend:
            atexit.register(dist.destroy_process_group)
    return dist.new_group(timeout=_FOREVER)
