import dataclasses
import pickle

import numpy as np
import pytest

from equimd.kernels import irreps_dim, make_layer_plan, make_plan, standard_irreps


def test_standard_irreps():
    assert standard_irreps(2) == ((0, 1), (1, -1), (2, 1))
    assert standard_irreps(1, parity=True) == ((0, 1), (0, -1), (1, -1), (1, 1))
    assert irreps_dim(standard_irreps(3)) == 16


@pytest.mark.parametrize(("l_max", "parity", "n_paths"), [(0, False, 1), (1, False, 4), (2, False, 11), (2, True, 30)])
def test_paths_obey_the_selection_rules(l_max, parity, n_paths):
    plan = make_layer_plan(l_max, parity)
    assert plan.n_paths == n_paths
    for path in plan.paths:
        assert abs(path.l1 - path.l2) <= path.l3 <= path.l1 + path.l2
        assert path.p3 == path.p1 * (-1) ** path.l2
        assert (path.l1 + path.l2 + path.l3) % 2 == 0 or parity


@pytest.mark.parametrize("plan", [make_layer_plan(2), make_plan([(0, 1)], 2, standard_irreps(2, parity=True))])
def test_every_output_row_has_one_writer(plan):
    rows = [row for path in plan.paths for row in range(plan.dim_out)[path.out_rows]]
    assert rows == list(range(plan.dim_out))
    assert [path.weight_index for path in plan.paths] == list(range(plan.n_paths))
    for block in plan.blocks:
        inside = [p for p in plan.paths if (p.l3, p.p3) == (block.l, block.p)]
        assert len(inside) == block.n_paths
        assert all(block.rows.start <= p.out_offset < block.rows.stop for p in inside)
        assert plan.out_slices[block.l, block.p] == block.rows


def test_first_and_last_layer():
    first = make_plan([(0, 1)], 2, standard_irreps(2))
    assert (first.dim_in, first.n_paths, first.dim_out) == (1, 3, 9)
    last = make_plan(standard_irreps(2), 2, [(0, 1)])
    assert (last.dim_in, last.n_paths, last.dim_out) == (9, 3, 3)


def test_unreachable_irreps_have_empty_blocks():
    plan = make_plan([(0, 1)], 1, standard_irreps(1, parity=True))
    assert [block.n_paths for block in plan.blocks] == [1, 0, 1, 0]


def test_coefficients_keep_unit_variance():
    for path in make_layer_plan(3, parity=True).paths:
        np.testing.assert_allclose((path.cg**2).sum(axis=(0, 1)), 1.0, atol=1e-12)  # float64 round-off


def test_plans_compare_by_value():
    plan = make_layer_plan(1)
    copy = pickle.loads(pickle.dumps(plan))
    assert plan is make_layer_plan(1)
    assert copy == plan
    assert hash(copy) == hash(plan)
    corrupted = dataclasses.replace(plan.paths[0], cg=2 * plan.paths[0].cg)
    assert dataclasses.replace(plan, paths=(corrupted, *plan.paths[1:])) != plan


@pytest.mark.parametrize("irreps", [[(0, 1), (0, 1)], [(-1, 1)], [(1, 0)]])
def test_bad_irreps_are_refused(irreps):
    with pytest.raises(ValueError, match="irreps must be distinct"):
        make_plan(irreps, 1, [(0, 1)])
