import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from training_samples import E0, spring_frames

from equimd.errors import InputError
from equimd.graph import batch_graphs, graph_from_arrays
from equimd.training.data import build_frame_set, epoch_batches, subset
from equimd.training.sections import BatchSection
from equimd.training.statistics import statistics

ENERGIES = {1: E0["H"], 6: E0["C"], 8: E0["O"]}


def periodic(seed: int) -> Atoms:
    atoms = bulk("C", "diamond", a=3.6) * (1, 1, 2)
    atoms.rattle(0.05, seed=seed)
    rng = np.random.default_rng(seed)
    atoms.calc = SinglePointCalculator(
        atoms, energy=-200.0, forces=rng.standard_normal((4, 3)), stress=rng.standard_normal(6)
    )
    return atoms


def test_a_batch_equals_graphs_made_one_by_one():
    frames = [*spring_frames(4, 0), periodic(1), periodic(2)]
    held = build_frame_set(frames, 3.0, ENERGIES, "x")
    which = [4, 0, 2, 2, 5]
    batch = held.batch(torch.tensor(which))
    graphs = []
    for k in which:
        atoms = frames[k]
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        if k > 3:
            labels["stress"] = atoms.get_stress(voigt=False)
        graphs.append(
            graph_from_arrays(atoms.positions, atoms.numbers, atoms.cell.array, np.asarray(atoms.pbc), 3.0, **labels)
        )
    expected = batch_graphs(graphs)
    assert batch.n_systems == 5
    for key in ("positions", "atomic_numbers", "edge_index", "edge_shifts", "cell", "pbc", "batch", "energy", "forces"):
        assert torch.equal(batch[key], expected[key]), key
    torch.testing.assert_close(batch.stress, expected.stress, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    "section", [BatchSection(n_frames=7), BatchSection(max_edges=100), BatchSection(n_frames=3, max_edges=60)]
)
def test_an_epoch_covers_each_frame_once(section):
    n_edges = np.random.default_rng(0).integers(5, 50, 53)
    n_edges[7] = 300  # larger than any batch may be: one by itself
    batches = epoch_batches(n_edges, section, seed=1, epoch=4)
    assert sorted(np.concatenate(batches).tolist()) == list(range(53))
    for batch in batches:
        assert len(batch) <= (section.n_frames or 53)
        assert len(batch) == 1 or n_edges[batch].sum() <= (section.max_edges or n_edges.sum())
    again = epoch_batches(n_edges, section, seed=1, epoch=4)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    other = epoch_batches(n_edges, section, seed=1, epoch=5)
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))


def test_statistics_recover_shifts_and_neighbours():
    frames = spring_frames(12, 0)
    shift = {1: 0.5, 6: -2.0, 8: 1.5}
    for atoms in frames:
        energy = sum(ENERGIES[z] + shift[z] for z in atoms.numbers)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.full((len(atoms), 3), 2.0))
    held = build_frame_set(frames, 3.0, ENERGIES, "x")
    found = statistics(held.arrays, ENERGIES)
    assert found.shift == pytest.approx(shift, abs=1e-9)
    assert found.force_rms == pytest.approx(2.0)
    assert found.mean_neighbors == pytest.approx(int(held.n_edges.sum()) / sum(map(len, frames)))


def test_one_composition_gets_a_finite_shift():
    held = build_frame_set(spring_frames(4, 0, names=("CH4",)), 3.0, ENERGIES, "x")
    shift = statistics(held.arrays, ENERGIES).shift
    relative = (held.energy - (ENERGIES[6] + 4 * ENERGIES[1])).mean()
    assert shift[6] + 4 * shift[1] == pytest.approx(float(relative))
    assert abs(shift[6]) < 1.0


def test_refusals():
    frames = spring_frames(3, 0)
    with pytest.raises(InputError, match="holds no frames"):
        build_frame_set([], 3.0, ENERGIES, "train.xyz")
    with pytest.raises(InputError, match="train.xyz has O, which has no isolated-atom energy"):
        build_frame_set(frames, 3.0, {1: 0.0, 6: 0.0}, "train.xyz")
    with pytest.raises(InputError, match="neither energies nor forces"):
        build_frame_set([Atoms("CO", [[0, 0, 0], [0, 0, 1.1]])], 3.0, ENERGIES, "train.xyz")
    with pytest.raises(InputError, match="n_train is 9; the file has 3"):
        subset(3, 9, 0)


def test_a_missing_label_is_nan():
    frames = spring_frames(2, 0)
    frames[1].calc = SinglePointCalculator(frames[1], energy=-50.0)
    held = build_frame_set(frames, 3.0, ENERGIES, "x")
    assert held.has("forces")
    assert not held.has("stress")
    assert torch.isnan(held.forces[len(frames[0]) :]).all()


def test_subset_is_seeded():
    assert subset(10, None, 0) is None
    chosen = subset(10, 4, 0)
    assert chosen is not None
    assert len(set(chosen.tolist())) == 4
    assert np.array_equal(chosen, subset(10, 4, 0))
