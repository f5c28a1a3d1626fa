"""The loop that every worker of the peer benchmark runs: read a line, do as it says, answer with a line.

A worker lives in its own environment and imports nothing of equimd's. ``{"setup": task}`` builds a model with random
weights and answers with its number of parameters; ``{"run": n}`` answers with the seconds of each of n calls.
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


def serve(setup):
    """Answer requests until the input ends; ``setup(task)`` returns (call without arguments, facts)."""
    warnings.filterwarnings("ignore")
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not an answer
    call = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "setup" in request:
                call, answer = setup(request["setup"])
            else:
                seconds = []
                for _ in range(request["run"]):
                    start = time.perf_counter()
                    call()
                    seconds.append(time.perf_counter() - start)
                answer = {"seconds": seconds}
        except Exception as error:  # the parent decides what it means
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=out, flush=True)
