"""Search for a learning rate and a batch size with Optuna; trials that fall behind are stopped early.

pip install optuna
python examples/search_optuna.py [TRIALS]
"""

import csv
import sys
import tempfile
from pathlib import Path

from train_tiny import MODELS, rattled

from equimd.frames import write_frames
from equimd.training import train
from equimd.training.recipe import make_recipe

try:
    import optuna
except ImportError:
    sys.exit("this example needs Optuna: pip install optuna")

ROUNDS = (10, 20, 40)  # steps after which trials are compared; schedule "constant" lets a training be continued


def force_error(folder: Path) -> float:
    """The latest validation force MAE in meV/Å."""
    with open(folder / "metrics.csv", encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["valid_force_mae_meV_per_A"])


def objective(trial: optuna.Trial, folder: Path) -> float:
    values = {
        "name": f"trial-{trial.number}",
        "model": MODELS["equivariant"],
        "data": {"train": "train.xyz", "valid": "valid.xyz", "isolated_atom_energies": {"Cu": 0.0}},
        "optimizer": {"lr": trial.suggest_float("lr", 1e-4, 1e-1, log=True)},
        "batch": {"n_frames": trial.suggest_categorical("n_frames", [4, 8])},
        "schedule": {"kind": "constant", "warmup_steps": 5},
        "ema": {"decay": 0.9},
    }
    run = folder / values["name"]
    for steps in ROUNDS:
        train(make_recipe(values | {"steps": steps}, folder), run, resume=run.exists(), progress=False)
        trial.report(force_error(run), steps)
        if trial.should_prune():
            raise optuna.TrialPruned
    return force_error(run)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_frames(Path(name) / "train.xyz", [rattled(seed) for seed in range(32)])
        write_frames(Path(name) / "valid.xyz", [rattled(seed) for seed in range(32, 40)])
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0), pruner=optuna.pruners.MedianPruner(2))
        study.optimize(lambda trial: objective(trial, Path(name)), int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    print(f"best of {len(study.trials)}: {study.best_value:.1f} meV/Å with {study.best_params}")
