"""What decides the accuracy of a training: one setting changed at a time, at equal device-minutes, both families.

    python benchmarks/ablation.py [--minutes 2] [--family FAMILY] [--only FACTOR ...] [--work FOLDER] [--jobs 1]

Ethanol (data/ethanol), one thread of one core for each training; the schedule ends when the minutes are spent, so a
setting that makes steps cheaper gets more of them. Kernels and graphs are compiled and cached before the clock starts.
Several seeds of the base say how much a difference must be to mean anything. Trainings that are done are not done
again while recipe, data and code are the same; --jobs 2 trains two at once, each on a core of its own. Writes
benchmarks/results/ablation.json and the table in docs/ablation.md: about a hundred minutes of a core. A part of it, by
--family or --only, is printed.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tables import markdown, write_table

if TYPE_CHECKING:
    from equimd.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ablation.json"
PAGE = ROOT / "docs" / "ablation.md"
DATA = ROOT / "data" / "ethanol"
FAMILIES = ("equivariant", "transformer")
ROW = "row.json"
"""What a training leaves in its folder: what it was made from, its result, and where and when it was made."""
UNLIMITED = 10_000_000  # steps; the minutes end a training before


class Variant(NamedTuple):
    """A setting of its ``factor`` that is not the base's, as overrides of the recipe."""

    factor: str
    label: str
    overrides: tuple[str, ...]


BASE: dict[str, dict[str, Any]] = {
    "equivariant": {
        "model": {"family": "equivariant", "cutoff": 5.0, "n_layers": 3, "l_max": 2, "n_channels": 32},
        "optimizer": {"name": "muon", "lr": 1e-2},
        "batch": {"n_frames": 16},
    },
    "transformer": {
        "model": {
            "family": "transformer",
            "cutoff": 5.0,
            "d_model": 64,
            "n_heads": 4,
            "n_gnn_layers": 2,
            "n_attention_layers": 2,
            "d_feedforward": 128,
        },
        "optimizer": {"name": "muon", "lr": 8e-3},
        "batch": {"n_frames": 8},
    },
}
"""What every variant changes one thing of; the rest is in ``recipe``."""

_SEEDS = tuple(Variant("base", f"seed {seed}", (f"seed={seed}",)) for seed in (1, 2, 3))
_COMMON = (
    Variant("batch", "4 frames", ("batch.n_frames=4",)),
    Variant("batch", "32 frames", ("batch.n_frames=32",)),
    Variant("schedule", "constant", ("schedule.kind=constant",)),
    Variant("schedule", "wsd", ("schedule.kind=wsd",)),
    Variant("average of weights", "none", ("ema.decay=0",)),
    Variant("average of weights", "over a tenth of the steps", ("ema.fraction=0.1",)),
    Variant("loss", "squares", ("loss={kind: mse, energy: 10, forces: 1}",)),
    Variant("DeNS", "a quarter of the batches", ("denoising.probability=0.25",)),
)
VARIANTS: dict[str, tuple[Variant, ...]] = {
    "equivariant": (
        *_SEEDS,
        Variant("optimiser", "AdamW, 5e-3", ("optimizer={name: adamw, lr: 5.0e-3}",)),
        Variant("optimiser", "Muon, matrices whole", ("optimizer.muon_split=false",)),
        Variant("learning rate", "5e-3", ("optimizer.lr=5e-3",)),
        Variant("learning rate", "2e-2", ("optimizer.lr=2e-2",)),
        Variant("batch", "8 frames", ("batch.n_frames=8",)),
        *_COMMON,
        Variant(
            "copies per step", "8 frames, each 2 times", ("augmentation={rotate: true, copies: 2}", "batch.n_frames=8")
        ),
        Variant("channels and layers", "2 layers, 64", ("model.n_layers=2", "model.n_channels=64")),
        Variant("channels and layers", "4 layers, 16", ("model.n_layers=4", "model.n_channels=16")),
        Variant("channels and layers", "3 layers, 32, l_max 1", ("model.l_max=1",)),
    ),
    "transformer": (
        *_SEEDS,
        Variant("optimiser", "AdamW, 2e-3", ("optimizer={name: adamw, lr: 2.0e-3}",)),
        Variant("learning rate", "4e-3", ("optimizer.lr=4e-3",)),
        Variant("learning rate", "1.6e-2", ("optimizer.lr=1.6e-2",)),
        Variant("batch", "16 frames", ("batch.n_frames=16",)),
        *_COMMON,
        Variant("copies per step", "8 frames, not rotated", ("augmentation.rotate=false",)),
        Variant("copies per step", "4 frames, each 2 times", ("augmentation.copies=2", "batch.n_frames=4")),
        Variant("pre-training", "forces of a head, 30 %", ("pretraining.fraction=0.3",)),
        Variant("channels and layers", "2 × 2 layers, 48", ("model.d_model=48", "model.d_feedforward=96")),
        Variant("channels and layers", "2 × 2 layers, 96", ("model.d_model=96", "model.d_feedforward=192")),
        Variant("channels and layers", "2 × 1 layers, 64", ("model.n_attention_layers=1",)),
    ),
}


def recipe(family: str, minutes: float) -> dict[str, Any]:
    """The base."""
    return {
        "name": f"ablation-{family}",
        "seed": 1,
        "data": {
            "train": str(DATA / "train.xyz.gz"),
            "valid": str(DATA / "valid.xyz.gz"),
            "test": str(DATA / "test.xyz.gz"),
            "isolated_atom_energies": str(DATA / "info.json"),
            "reference": "gfn2-xtb",
        },
        "loss": {"kind": "mae", "energy": 1.0, "forces": 1.0},
        "schedule": {"kind": "cosine", "warmup_steps": 100},
        "steps": UNLIMITED,
        "max_minutes": minutes,
        "validation": {"every": UNLIMITED},
        "checkpoint": {"minutes": None},
        "n_threads": 1,
        "device": "cpu",
        **BASE[family],
    }


def work(family: str, overrides: Sequence[str], minutes: float, jobs: int, folder: Path) -> None:
    """Compile by some steps, train, and write the row into the folder; in a process of its own."""
    import tempfile

    from equimd.results import provenance, write_text_atomically
    from equimd.training import train

    wanted = resolved(family, overrides, minutes)
    once = resolved(family, [*overrides, "steps=20", "max_minutes=null", "validation.symmetry_frames=0"], minutes)
    with tempfile.TemporaryDirectory() as compiled:
        train(once, Path(compiled) / "run", progress=False)
    result = train(wanted, folder, progress=False)
    row = {
        "made_from": made_from(wanted, jobs),
        "result": result.model_dump(mode="json"),
        "provenance": provenance(n_threads=1).model_dump(),
    }
    write_text_atomically(folder / ROW, json.dumps(row))


def resolved(family: str, overrides: Sequence[str], minutes: float) -> "Recipe":
    """The recipe of a variant, with all its defaults."""
    import tempfile

    import yaml

    from equimd.training import load_recipe

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(family, minutes)), encoding="utf-8")
        return load_recipe(path, list(overrides))


def made_from(wanted: "Recipe", jobs: int) -> dict[str, Any]:
    """All that a result depends on, the machine aside: recipe, data, code, versions, and trainings beside it."""
    versions = {name: version(name) for name in ("torch", "llvmlite", "numpy")}
    return {"recipe": wanted.model_dump(mode="json"), "jobs": jobs, "sha256": _hashes(), "versions": versions}


def _hashes() -> dict[str, str]:
    data = [*sorted(DATA.glob("*.xyz.gz")), DATA / "info.json"]
    parts = {"data": data, "code": sorted((ROOT / "equimd").rglob("*.py"))}
    return {
        name: hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest() for name, paths in parts.items()
    }


def trained(folder: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """What ``work`` left in a folder; None where it did not come to its end, or while its code was changed."""
    row = json.loads((folder / ROW).read_text(encoding="utf-8")) if (folder / ROW).exists() else None
    return row if row is not None and row["made_from"] == inputs else None


def run(family: str, variant: Variant, minutes: float, jobs: int, folder: Path) -> dict[str, Any] | str:
    """The row of one variant, trained unless it is there; or what went wrong."""
    inputs = made_from(resolved(family, variant.overrides, minutes), jobs)
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    words = f"{family} {variant.factor} {variant.label} {digest}"
    name = "-".join(words.replace(",", "").replace("×", "x").split())
    found = trained(folder / name, inputs)
    if found is None:
        shutil.rmtree(folder / name, ignore_errors=True)  # not finished: minutes do not resume
        arguments = json.dumps([family, variant.overrides, minutes, jobs, str(folder / name)])
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--worker", arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        found = trained(folder / name, inputs)
        if found is None:
            return f"{name}: {(done.stderr.strip() or 'no result').splitlines()[-1]}"
    values, made = found["result"], found["provenance"]
    row = {
        "family": family,
        "factor": variant.factor,
        "label": variant.label,
        "overrides": list(variant.overrides),
        "n_parameters": values["n_parameters"],
        "steps": values["steps"],
        "frames_per_s": values["frames_per_s"],
        "device_hours": values["device_hours"],
        "valid": values["valid"],
        "test": values["test"],
        "symmetry": values["symmetry"],
        "processor": made["processor"],
        "date": made["date"],
        "versions": {name: made["versions"][name] for name in ("torch", "equimd")},
    }
    print(
        f"{family:12} {variant.factor:20} {variant.label:28} {1e3 * row['valid']['force_mae']:7.2f} meV/Å", flush=True
    )
    return row


def table(results: dict[str, Any]) -> str:
    """Markdown: a table a family, in the order of the variants."""
    parts = []
    for family in FAMILIES:
        rows = [row for row in results["rows"] if row["family"] == family]
        if not rows:
            continue
        base = [1e3 * row["valid"]["force_mae"] for row in rows if row["factor"] == "base"]
        mean = sum(base) / len(base)
        seeds = f"{100 * (min(base) / mean - 1):+.0f} to {100 * (max(base) / mean - 1):+.0f} %"
        lines = []
        for row in rows:
            valid, share = 1e3 * row["valid"]["force_mae"], row["symmetry"]["percent_of_loss"]
            lines.append(
                [
                    row["factor"],
                    row["label"],
                    f"{row['n_parameters']:,}",
                    f"{row['steps']:,}",
                    f"{row['frames_per_s']:.0f}",
                    f"{valid:.1f}",
                    f"{100 * (valid / mean - 1):+.0f} %",
                    f"{1e3 * row['test']['force_mae']:.1f}",
                    f"{1e3 * row['valid']['energy_per_atom_mae']:.2f}",
                    "0" if share < 1e-3 else f"{share:.1f}",
                ]
            )
        head = (
            "factor",
            "setting",
            "parameters",
            "steps",
            "frames/s",
            "force MAE, validation (meV/Å)",
            f"against the mean of the base (its seeds: {seeds})",
            "test",
            "energy MAE (meV/atom)",
            "% of loss",
        )
        parts.append(f"**{family}**\n\n{markdown(head, lines)}")
    versions = " and ".join(
        sorted({", ".join(f"{name}=={number}" for name, number in row["versions"].items()) for row in results["rows"]})
    )
    at_once = f", {results['jobs']} trainings at once" if results["jobs"] > 1 else ""
    where = " and ".join(sorted({row["processor"] for row in results["rows"]}))
    dates = sorted({row["date"] for row in results["rows"]})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    parts.append(f"{results['minutes']:g} device-minutes each, one thread{at_once}; {where}, {when}; {versions}.")
    return "\n\n".join(parts)


def main() -> None:
    """Train what is missing, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only this; by default both")
    parser.add_argument("--only", nargs="+", metavar="FACTOR", help="only these factors; 'base' is one")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ablation", help="folder of the trainings")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once")
    parser.add_argument("--print", action="store_true", help="print the table, write nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        family, overrides, minutes, jobs, folder = json.loads(options.worker)
        work(family, overrides, minutes, jobs, Path(folder))
        return
    known = sorted({variant.factor for variants in VARIANTS.values() for variant in variants})
    if unknown := [factor for factor in options.only or () if factor not in known]:
        parser.error(f"--only is {unknown[0]!r}; accepted are {', '.join(known)}")
    families = options.family or list(FAMILIES)
    factors = None if options.only is None else {"base", *options.only}  # the base is what all are compared with
    asked = [(f, v) for f in families for v in VARIANTS[f] if factors is None or v.factor in factors]
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(lambda pair: run(*pair, options.minutes, options.jobs, options.work.resolve()), asked))
    failed = [text for text in found if isinstance(text, str)]
    if failed:
        sys.exit("\n".join([*failed, "nothing is written; what is trained is kept"]))
    from equimd.results import provenance, write_text_atomically

    results = {
        "schema_version": 1,
        "minutes": options.minutes,
        "jobs": options.jobs,
        "rows": found,
        "provenance": provenance(n_threads=1).model_dump(),
    }
    if options.print or factors is not None or set(families) != set(FAMILIES):
        print(table(results))
        return
    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("ablation", table(results), PAGE)


if __name__ == "__main__":
    main()
