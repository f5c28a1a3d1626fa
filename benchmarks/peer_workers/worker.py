"""The loop that every worker of the peer benchmark runs: read a line, do as it says, answer with a line.

A worker lives in its own environment and imports nothing of equimd's. ``{"setup": task}`` builds a model with random
weights and answers with its number of parameters; ``{"run": n}`` answers with the seconds of each of n calls. A task
may name a "device", by default "cpu"; a call on a GPU ends when the GPU has done its work.
"""

import json
import sys
import time
import warnings


def structure(task):
    """numbers (N,), positions (N, 3) Å and the cubic cell's edge, or None without a cell."""
    import numpy as np

    data = np.load(task["structure"])
    length = float(data["length"])
    return data["numbers"], data["positions"], length if length > 0 else None


def device_of(task):
    """The torch device that the task is for."""
    import torch

    return torch.device(task.get("device", "cpu"))


def versions(*packages):
    """What is installed here, by name."""
    from importlib import metadata

    return {name: metadata.version(name) for name in packages}


def _synchronize(device):
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def serve(setup):
    """Answer requests until the input ends; ``setup(task)`` returns (call without arguments, facts)."""
    warnings.filterwarnings("ignore")
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    call = device = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "setup" in request:
                call = None  # so that a large model makes room for the next
                call, answer = setup(request["setup"])
                device = device_of(request["setup"])
                _synchronize(device)
            else:
                seconds = []
                for _ in range(request["run"]):
                    start = time.perf_counter()
                    call()
                    _synchronize(device)
                    seconds.append(time.perf_counter() - start)
                answer = {"seconds": seconds}
        except Exception as error:  # the parent decides what it means
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=out, flush=True)
