"""Whether the machine did other work during a training: then its hours are an upper bound, its frames/s a lower one."""

import os

LEAST_SHARE = 0.8
"""A training on a CPU computes all the time: its CPU time is that of the clock at least, but for what it reads."""
LEAST_HOURS = 1.0 / 60.0
"""Of the clock, from which on a session is judged: the load average is that of the last minute."""
_BETWEEN_HOURS = 10.0 / 3600.0


def cpu_hours() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4]) / 3600.0


class Sharing:
    """What a session notices of other work on its machine."""

    def __init__(self, on_cpu: bool) -> None:
        self.on_cpu, self.n_cores = on_cpu, os.cpu_count() or 1
        self._loads: list[float] = [0.0, 0.0]  # sum and number
        self._next = LEAST_HOURS

    def look(self, hours: float) -> None:
        """Note the load average, ``hours`` of the clock after the session began; every ten seconds at most."""
        if hours >= self._next and hasattr(os, "getloadavg"):
            self._next = hours + _BETWEEN_HOURS
            self._loads = [self._loads[0] + os.getloadavg()[0], self._loads[1] + 1]

    @property
    def load(self) -> float | None:
        """Mean load average; None without any."""
        return self._loads[0] / self._loads[1] if self._loads[1] else None

    def verdict(self, hours: float, cpu: float) -> str | None:
        """What tells of other work, after ``hours`` of all processes and ``cpu`` hours of CPU time; None if nothing."""
        if hours < LEAST_HOURS:
            return None
        told = []
        if self.on_cpu and cpu < LEAST_SHARE * hours:
            told.append(f"the CPU time is {100 * cpu / hours:.0f} % of the clock's")
        if self.load is not None and self.load > self.n_cores + 0.5:
            told.append(f"the load is {self.load:.1f} on {self.n_cores} cores")
        return " and ".join(told) or None
