"""Turn finished trainings into shipped potentials, and the cards into the README's table.

    python potentials/release.py RUN NAME      copies RUN/model.safetensors to potentials/NAME/ and measures its card
    python potentials/release.py --table       writes the table between the markers of README.md

A card stores primitives: counts, hours, hashes and measured errors. Rates are derived where they are shown.
"""

import argparse
import datetime
import hashlib
import json
import shutil
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import yaml

from equimd.models.header import seal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- potentials: begin -->", "<!-- potentials: end -->"
SYMMETRY_FRAMES = 12


def main() -> None:
    """Parse and call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="folder of a finished training")
    parser.add_argument("name", nargs="?", help="folder below potentials/")
    parser.add_argument("--table", action="store_true", help="only write the README's table")
    options = parser.parse_args()
    if not options.table:
        if options.run is None or options.name is None:
            parser.error("give RUN and NAME, or --table")
        release(options.run, options.name)
    write_table()


def release(run: Path, name: str) -> None:
    """Copy the weights and ``start.xyz``, measure, and write ``card.yaml``."""
    folder = HERE / name
    data = ROOT / "data" / name.rsplit("-", 1)[0]
    shutil.copyfile(run / "model.safetensors", folder / "model.safetensors")
    shutil.copyfile(data / "start.xyz", folder / "start.xyz")
    (folder / "card.yaml").unlink(missing_ok=True)  # of other weights, which would be refused beside it
    card = seal(make_card(folder, name, data), "card_sha256")
    text = yaml.safe_dump(card, sort_keys=False, allow_unicode=True, width=110)
    (folder / "card.yaml").write_text(text, encoding="utf-8")
    print(text)


def make_card(folder: Path, name: str, data: Path) -> dict[str, Any]:
    """Everything a user wants to know of a potential, measured now."""
    from equimd import EquimdCalculator, equivariance_error, measure_throughput
    from equimd.cli.common import cpu_threads
    from equimd.frames import read_list
    from equimd.models.checkpoint import load_checkpoint

    weights = folder / "model.safetensors"
    potential, header = load_checkpoint(weights)
    calculator = EquimdCalculator(folder)
    test = read_list(data / "test.xyz.gz")
    start = read_list(folder / "start.xyz")[0]
    spread = equivariance_error(calculator, test[:: max(1, len(test) // SYMMETRY_FRAMES)], degree=4)
    with cpu_threads(None, len(start)):  # as `equimd md` would
        speed = measure_throughput(calculator, start, timestep_fs=0.5)
    info = json.loads((data / "info.json").read_text(encoding="utf-8"))
    ledger = header["ledger"]
    loss = spread.loss
    return {
        "name": name,
        "family": potential.family,
        "reference": info["reference"],
        "elements": sorted(info["isolated_atom_energies"]),
        "n_parameters": sum(p.numel() for p in potential.parameters()),
        "cutoff": potential.cutoff,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "data": {"name": data.name, "n_train": header["n_train"], "sha256": header["data_sha256"]},
        "training": {
            key: ledger[key] for key in ("device", "n_devices", "n_threads", "device_hours", "steps", "frames_seen")
        }
        | {key: ledger[key] for key in ("cpu_hours", "shared") if key in ledger},
        "test": _errors(calculator, test),
        "hot": _errors(calculator, read_list(data / "hot.xyz.gz")),
        "equivariance": {
            "n_frames": spread.n_frames,
            "degree": spread.group.degree,
            "force_rmse": spread.force.rmse_equiv,
            "force_relative": spread.force.relative,
            "at_floor": spread.force.at_floor,
            "percent_of_loss": None if loss is None else loss.percent_of_loss,
        },
        "speed": {
            "n_atoms": speed.n_atoms,
            "device": speed.device,
            "dtype": speed.dtype,
            "n_threads": speed.provenance.n_threads,
            "ms_per_step": speed.ms_per_step.median,
            "ms_per_forward": speed.ms_per_forward.median,
            "unstable": speed.unstable,
        },
        "machine": speed.provenance.processor,
        "versions": speed.provenance.versions,
        "date": datetime.date.today().isoformat(),
    }


def _errors(calculator: Any, frames: list) -> dict[str, Any]:
    """Errors on labelled frames in eV, eV/Å, eV/Å³."""
    from equimd.analysis.accuracy import evaluate_accuracy

    result = evaluate_accuracy(calculator, frames)
    block: dict[str, Any] = {"n_frames": result.n_frames}
    for key in ("energy_per_atom", "force", "stress"):
        errors = getattr(result, key)
        if errors is not None:
            block |= {f"{key}_mae": errors.mae, f"{key}_rmse": errors.rmse}
    return block


def _processes(training: dict[str, Any]) -> str:
    """How a training used its machine."""
    devices, threads = training["n_devices"], training["n_threads"]
    return f"{devices} process{'es' * (devices > 1)} of {threads} thread{'s' * (threads > 1)}"


def write_table() -> None:
    """Replace what stands between the markers in the README by the table of all cards."""
    cards = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*/card.yaml"))]
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    README.write_text(f"{head}{BEGIN}\n{table(cards)}\n{END}{tail}", encoding="utf-8")


def table(cards: list[dict[str, Any]]) -> str:
    """The cards as a Markdown table; letters say on which machine a row was timed and trained."""
    machines = sorted({name for card in cards for name in (card["machine"], card["training"]["device"])})
    letters = {name: ascii_lowercase[k] for k, name in enumerate(machines)}
    rows = [
        "| potential | reference | force MAE, test / hot (meV/Å) | energy MAE (meV/atom) | symmetry error (meV/Å) "
        "| % of loss | ms per MD step (atoms) | training: device-hours, frames/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card in cards:
        test, hot, symmetry, speed = card["test"], card["hot"], card["equivariance"], card["speed"]
        share, training = symmetry["percent_of_loss"], card["training"]
        frames_per_s = training["frames_seen"] / (3600 * training["device_hours"])
        rows.append(
            f"| `{card['name']}` | {card['reference'].upper().replace('XTB', 'xTB')} "
            f"| {1e3 * test['force_mae']:.1f} / {1e3 * hot['force_mae']:.1f} | {1e3 * test['energy_per_atom_mae']:.2f} "
            f"| {'exact' if symmetry['at_floor'] else format(1e3 * symmetry['force_rmse'], '.2f')} "
            f"| {'0' if symmetry['at_floor'] or share is None else format(share, '.2g')} "
            f"| {speed['ms_per_step']:.1f}{'*' * speed['unstable']} ({speed['n_atoms']}) {letters[card['machine']]} "
            f"| {training['device_hours']:.2f}, {frames_per_s:.0f} {letters[training['device']]} |"
        )
    dates = {name: sorted({card["date"] for card in cards if card["machine"] == name}) for name in machines}
    where = "; ".join(f"{letters[name]}: {', '.join([name, *dates[name]])}" for name in machines)
    note = " * Times varied by more than 20 %." if any(card["speed"]["unstable"] for card in cards) else ""
    training = " or ".join(sorted({_processes(card["training"]) for card in cards}))
    speed = " or ".join(sorted({str(card["speed"]["n_threads"]) for card in cards}))
    threads = f"Training took {training}, MD {speed} threads; frames/s are a process's, validations counted in."
    return "\n".join(rows) + f"\n\n{where}. {threads}{note}"


if __name__ == "__main__":
    main()
