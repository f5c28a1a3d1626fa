"""What a training costs: hours of the clock, of devices and of CPUs, frames per second, over all of its sessions."""

import time
from typing import Any

import torch

from equimd.training.distributed import World
from equimd.training.setup import device_name
from equimd.training.sharing import Sharing, cpu_hours
from equimd.training.state import Progress


class Ledger:
    """The clock of a session on top of what ``progress`` remembers of those before.

    ``hours`` is the time that decisions are made by: that of process 0 when ``agree`` was last called, so that all
    processes decide alike; ``cpu_hours``, of all processes, is as of then too, None for a run of a version that did
    not count them.
    """

    def __init__(self, progress: Progress, world: World) -> None:
        self.progress, self.world = progress, world
        self.hours_before, self.device_hours_before = progress.hours, progress.device_hours
        self.started = time.monotonic()
        self.hours = progress.hours
        self._steps = (0.0, 0)
        self.sharing = Sharing(world.device.type == "cpu")
        self._cpu_at_start, self._cpu = cpu_hours(), 0.0
        self._cpu_before = progress.cpu_hours if progress.hours > 0 else 0.0

    def agree(self, counts: torch.Tensor) -> torch.Tensor:
        """Sums of ``counts`` (n,) over processes; on the way, the time is agreed on, and whether to stop.

        Raises:
            StoppedError: on all processes, where a signal asks any of them to stop.
        """
        world = self.world
        own = [self.now() if world.is_first else 0.0, cpu_hours() - self._cpu_at_start, float(world.signal is not None)]
        *sums, self.hours, self._cpu, signals = world.sum(torch.cat([counts, counts.new_tensor(own)])).tolist()
        self.sharing.look(self.hours - self.hours_before)
        if signals:
            world.signal = world.signal or "a signal to another process"
            raise world.same_everywhere(world.stopped(self.progress.step))
        return counts.new_tensor(sums)

    def now(self) -> float:
        """Wall-clock hours over all sessions, by this process's clock; validations included."""
        return self.hours_before + (time.monotonic() - self.started) / 3600.0

    @property
    def device_hours(self) -> float:
        """Wall-clock hours times devices, as of now."""
        return self.device_hours_before + (self.now() - self.hours_before) * self.world.size

    @property
    def cpu_hours(self) -> float | None:
        """CPU time of all processes, over all sessions."""
        return None if self._cpu_before is None else self._cpu_before + self._cpu

    def other_work(self) -> str | None:
        """What tells that the machine does other work, in this session; None if nothing does."""
        return self.sharing.verdict((self.hours - self.hours_before) * self.world.size, self._cpu)

    @property
    def shared(self) -> bool:
        """Whether the machine did other work, in any session."""
        return self.progress.shared or self.other_work() is not None

    def stepped(self, seconds: float, frames: int) -> None:
        """Count a step."""
        self.progress.frames_seen += frames
        self.progress.train_seconds += seconds
        self._steps = self._steps[0] + seconds, self._steps[1] + frames

    def recent_frames_per_s(self) -> float | None:
        """Of the steps since the last call."""
        (seconds, frames), self._steps = self._steps, (0.0, 0)
        return frames / seconds if seconds > 0 else None

    def frames_per_s(self) -> float | None:
        """Training frames per second of all steps so far; validations and writing left out."""
        p = self.progress
        return p.frames_seen / p.train_seconds if p.train_seconds > 0 else None

    def note(self) -> None:
        """Put the hours where they are saved."""
        p = self.progress
        p.device_hours, p.hours, p.cpu_hours, p.shared = self.device_hours, self.now(), self.cpu_hours, self.shared

    def entry(self) -> dict[str, Any]:
        """What the header of a checkpoint says of the cost so far."""
        p = self.progress
        return {
            "device": device_name(self.world.device),
            "n_devices": self.world.size,
            "n_threads": torch.get_num_threads(),
            "hours": self.now(),
            "device_hours": self.device_hours,
            "cpu_hours": self.cpu_hours,
            "shared": self.shared,
            "sessions": p.sessions,
            "steps": p.step,
            "epochs": p.epoch,
            "frames_seen": p.frames_seen,
            "frames_per_s": self.frames_per_s(),
            "best_step": p.best_step,
        }
