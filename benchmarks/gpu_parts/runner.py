"""Run the parts of the benchmark in processes of their own, within a time, and keep what each case has said.

A part is a function that lists cases; a case is a name and a call that returns figures. Cases run in a child process,
which alone touches the GPU: where a kernel breaks the device's context, crashes or hangs, the child is given up, the
case is recorded as what it was, and another child goes on with the next one.
"""

import gc
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from gpu_parts.systems import Options
from gpu_parts.timing import synchronize

GRACE_SECONDS = 2.0
"""What a case may take beyond the part's deadline before its process is ended."""


class Case(NamedTuple):
    """What is measured, by name and value, and the call that returns figures."""

    name: dict[str, Any]
    call: Callable[[], dict[str, Any]]


class Skip(Exception):  # noqa: N818 (no error)
    """Raised by a case that has nothing to measure here, with the reason."""


class Part(NamedTuple):
    """cases: lists them; weight: its share of the time left when it begins, relative to the parts after it.

    case_seconds: the longest a case may take; n_lanes: processes on a GPU that share the cases, where nothing is timed.
    """

    cases: Callable[[Options], list[Case]]
    weight: float
    case_seconds: float = 60.0
    n_lanes: int = 1


@dataclass
class Lane:
    """A child process at work on every ``n_lanes``-th case, and the case it is at."""

    number: int
    process: Any
    pipe: Connection
    at: int | None = None
    since: float = field(default_factory=time.monotonic)


class Run:
    """One part at work; ``records`` hold a case each, in order, as they are known so far."""

    def __init__(self, part: Part, options: Options, deadline: float, method: str = "fork") -> None:
        self.part, self.options, self.deadline = part, options, deadline
        self.context: Any = multiprocessing.get_context(method)
        self.n_lanes = part.n_lanes if options.kind == "cuda" else 1
        self.records: list[dict[str, Any]] = []
        self.error: str | None = None
        self._lanes: list[Lane] = []

    def result(self, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """The part's state, error, seconds and cases; ``report`` is told of every case that ends."""
        begin = time.monotonic()
        try:
            if begin < self.deadline:
                self._lanes = [self._start(k, first=k) for k in range(self.n_lanes)]
            while self._lanes:
                self._wait(report)
        finally:
            for lane in self._lanes:
                _stop(lane)
        states = {record["state"] for record in self.records}
        if self.error is not None:
            state = "failed"
        elif states <= {"not reached"}:
            state = "not reached"
        else:
            state = "done" if states <= {"done", "skipped"} else "incomplete"
        error = {} if self.error is None else {"error": self.error}
        return {"state": state, **error, "seconds": round(time.monotonic() - begin, 1), "cases": self.records}

    def _start(self, number: int, first: int) -> Lane:
        ours, theirs = self.context.Pipe(duplex=False)
        arguments = (theirs, self.part.cases, self.options, first, self.n_lanes, self.deadline)
        process = self.context.Process(target=_work, args=arguments)
        process.start()
        theirs.close()
        return Lane(number, process, ours)

    def _wait(self, report: Callable[[dict[str, Any]], None]) -> None:
        """Take what the children say for a moment; give up those that have ended or take too long."""
        for pipe in wait([lane.pipe for lane in self._lanes], timeout=0.1):
            lane = next(lane for lane in self._lanes if lane.pipe is pipe)
            try:
                self._take(lane, lane.pipe.recv(), report)
            except (EOFError, OSError):
                _stop(lane, patience=5.0)
                self._go_on_after(lane, "failed", f"its process ended with code {lane.process.exitcode}", report)
        for lane in list(self._lanes):
            seconds, over = time.monotonic() - lane.since, time.monotonic() > self.deadline + GRACE_SECONDS
            if over or seconds > self.part.case_seconds:
                _stop(lane)
                why = f"stopped after {seconds:.0f} s{', the time of the part was over' * over}"
                self._go_on_after(lane, "stopped", why, report)

    def _take(self, lane: Lane, message: tuple[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
        what, value = message
        lane.since = time.monotonic()
        if what == "names" and not self.records:
            self.records += [{**name, "state": "not reached"} for name in value]
        elif what == "begun":
            lane.at = value
        elif what == "done":
            assert lane.at is not None
            self.records[lane.at] |= value
            report(self.records[lane.at])
        elif what == "error":
            self.error = value
        elif what == "end":
            self._lanes.remove(lane)
            _stop(lane, patience=1.0)

    def _go_on_after(self, lane: Lane, state: str, why: str, report: Callable[[dict[str, Any]], None]) -> None:
        """Record the case that a child has died at, if it is not known yet; start another with the next one."""
        self._lanes.remove(lane)
        if lane.at is None:
            self.error = self.error or f"no case was begun: {why}"
            return
        if self.records[lane.at]["state"] == "not reached":
            self.records[lane.at] |= {"state": state, "error": why}
            report(self.records[lane.at])
        following = lane.at + self.n_lanes
        if following < len(self.records) and time.monotonic() < self.deadline:
            self._lanes.append(self._start(lane.number, following))


def _stop(lane: Lane, patience: float = 0.0) -> None:
    """End a child, if it does not within its patience in s, and what it has started."""
    wait([lane.process.sentinel], timeout=patience)
    try:
        os.killpg(lane.process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
    except ProcessLookupError:  # it leads no group yet
        lane.process.kill()
    lane.process.join(timeout=5.0)
    lane.pipe.close()


def _work(
    pipe: Connection,
    cases_of: Callable[[Options], list[Case]],
    options: Options,
    first: int,
    stride: int,
    deadline: float,
) -> None:
    """The child: say the cases' names, and of each that is begun, and what came of it."""
    os.setpgid(0, 0)
    gc.freeze()  # what was imported is no garbage to look for after every case
    try:
        if options.kind == "cuda":
            if not torch.cuda.is_available():
                raise RuntimeError("torch sees no CUDA device here")
            torch.cuda.set_device(options.device)
        if stride > 1 or options.quick:
            torch.set_num_threads(1)
        cases = cases_of(options)
    except Exception as error:  # a part may fail in any way; the others go on
        pipe.send(("error", _describe(error)))
        pipe.send(("end", None))
        return
    pipe.send(("names", [case.name for case in cases]))
    for k in range(first, len(cases), stride):
        if time.monotonic() > deadline:
            break
        pipe.send(("begun", k))
        pipe.send(("done", _figures(cases[k].call)))
        gc.collect()
        if options.kind == "cuda":
            try:
                synchronize(options.device)
                torch.cuda.empty_cache()
            except RuntimeError:  # the context is lost: another process has to go on
                return
    pipe.send(("end", None))


def _figures(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        figures = call()
    except Skip as reason:
        return {"state": "skipped", "error": str(reason)}
    except Exception as error:  # a case may fail in any way; the others go on
        return {"state": "failed", "error": _describe(error)}
    wrong = [key for key, value in figures.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        figures |= dict.fromkeys(wrong) | {"error": f"not a finite number: {', '.join(wrong)}"}
    state = "failed" if wrong or figures.get("passed") is False else "done"
    return {"state": state, "seconds": round(time.monotonic() - begin, 2), **figures}


def _describe(error: Exception) -> str:
    """One line: the error, and the line of code it came from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {text} ({os.path.basename(frame.filename)}:{frame.lineno})"
