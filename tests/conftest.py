"""Puts this folder on the path, so that tests share ``toys``, and lets triton run on the CPU where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # triton looks when it is imported, which torch may do at any time; it then runs kernels number by number.
    os.environ.setdefault("TRITON_INTERPRET", "1")


torch.manual_seed(0)  # of networks that modules make when they are imported


@pytest.fixture(autouse=True)
def seed():
    """The same random weights in every run, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """``torch.set_num_threads``, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Tests that are slow by their nature, most of them because they compile large networks or start processes: beginnings
# of node ids. They carry the marker "slow" beside the tests that carry it in their own files, and CI runs them all.
SLOW = (
    "tests/calculators/test_openmm.py::test_equals_the_ase_calculator[equivariant-box-double",
    "tests/calculators/test_openmm.py::test_equals_the_ase_calculator[equivariant-molecule-double",
    "tests/calculators/test_openmm.py::test_equals_the_ase_calculator[transformer-box-double",
    "tests/calculators/test_openmm.py::test_equals_the_ase_calculator[transformer-molecule-double",
    "tests/calculators/test_openmm_docs.py::test_code_of_the_page_runs[docs",
    "tests/calculators/test_openmm_docs.py::test_the_page_turns_a_cell_back",
    "tests/cli/test_check.py::test_a_symmetry_that_is_learned",
    "tests/cli/test_check.py::test_other_tolerances",
    "tests/comparison/test_comparison.py::test_the_same_seed_gives_the_same_physics",
    "tests/contract/test_zoo.py",
    "tests/kernels/test_convolve.py::test_equals_e3nn[2-True",
    "tests/kernels/test_convolve.py::test_equals_e3nn[3",
    "tests/kernels/test_convolve.py::test_gradients_equal_reference[3",
    "tests/kernels/test_dual.py::test_threads_do_not_matter",
    "tests/kernels/test_dual.py::test_value_rate_and_gradients[1-True-precision2",
    "tests/kernels/test_dual.py::test_value_rate_and_gradients[2",
    "tests/kernels/test_dual.py::test_value_rate_and_gradients[3",
    "tests/kernels/test_network.py::test_equals_reference_in_float32[settings1",
    "tests/kernels/test_network.py::test_equals_reference_in_float32[settings3",
    "tests/kernels/test_network.py::test_equals_reference_in_float64[False-0",
    "tests/kernels/test_network.py::test_equals_reference_in_float64[False-2",
    "tests/kernels/test_network.py::test_equals_reference_in_float64[False-3",
    "tests/kernels/test_network.py::test_equals_reference_in_float64[True-2",
    "tests/kernels/test_network.py::test_equals_reference_in_float64[True-3",
    "tests/kernels/test_network.py::test_first_use_from_several_threads",
    "tests/kernels/test_network.py::test_new_weights_are_seen[_new_module",
    "tests/kernels/test_network.py::test_profile_names_every_part",
    "tests/kernels/test_network.py::test_unnatural_irreps_everywhere",
    "tests/kernels/test_llvm_cpu.py::test_fresh_process_imports_little_and_forks",
    "tests/kernels/test_shipped.py",
    "tests/kernels/test_token_network.py::test_equals_autograd_in_float32[{'d_model",
    "tests/kernels/test_token_network.py::test_equals_autograd_in_float32[{'n_heads': 1",
    "tests/kernels/test_token_network.py::test_equals_autograd_in_float32[{'n_heads': 8",
    "tests/kernels/test_token_network.py::test_equals_autograd_in_float64[{'d_model",
    "tests/kernels/test_token_network.py::test_equals_autograd_in_float64[{'n_heads': 1",
    "tests/kernels/test_token_network.py::test_equals_autograd_in_float64[{'n_heads': 8",
    "tests/md/test_run.py::test_a_killed_process_is_resumed_without_a_difference[replace",
    "tests/md/test_run.py::test_a_killed_process_is_resumed_without_a_difference[sync",
    "tests/md/test_run.py::test_a_killed_process_is_resumed_without_a_difference[forces-50",
    "tests/models/test_dual_training.py::test_a_prediction_is_freed",
    "tests/models/test_equivariant_training.py::test_gradient_in_float32",
    "tests/models/test_equivariant_training.py::test_gradient_is_that_of_autograd[{'l_max': 1",
    "tests/models/test_equivariant_training.py::test_gradient_is_that_of_autograd[{'l_max': 3",
    "tests/models/test_equivariant_training.py::test_knots_are_enough_for_trained_weights",
    "tests/models/test_selfcheck.py::test_broken_networks_fall_back",
    "tests/models/test_selfcheck.py::test_wrong_gradients",
    "tests/models/test_transformer_training.py::test_gradient_in_float32",
    "tests/models/test_transformer_training.py::test_gradient_is_that_of_autograd[{'d_model",
    "tests/models/test_transformer_training.py::test_gradient_is_that_of_autograd[{'n_heads",
    "tests/test_data.py",
    "tests/test_examples.py::test_example[ase_md",
    "tests/test_examples.py::test_example[equivariance_along_md",
    "tests/test_examples.py::test_example[someone_elses_calculator",
    "tests/test_examples.py::test_example[search_optuna",
    "tests/test_examples.py::test_example[train_tiny",
    "tests/test_gpu_benchmark.py::test_a_device_that_is_not_there_ends_it",
    "tests/training/test_dataset.py::test_training_from_the_cache_is_training_from_memory",
    "tests/training/test_distributed.py::test_a_killed_process",
    "tests/training/test_distributed.py::test_a_signal_to_one_process",
    "tests/training/test_distributed.py::test_means_over_the_labels",
    "tests/training/test_distributed.py::test_two_processes_do_what_one_does",
    "tests/training/test_distributed.py::test_what_fails_on_one_process",
    "tests/training/test_initial.py::test_another_level_of_theory_gets_other_shifts_and_the_same_scale[equivariant",
    "tests/training/test_initial.py::test_it_starts_with_what_the_parent_predicts[equivariant",
    "tests/training/test_loop.py::test_a_killed_training_continues_bit_for_bit[adamw",
    "tests/training/test_loop.py::test_a_killed_training_continues_bit_for_bit[muon",
    "tests/training/test_objective.py::test_forces_are_read[equivariant",
    "tests/training/test_objective.py::test_noise_is_found[equivariant",
    "tests/training/test_precision.py::test_a_training_reports_its_error",
    "tests/training/test_robustness.py::test_a_full_disk_loses_nothing",
    "tests/training/test_robustness.py::test_freed_memory_is_kept",
    "tests/training/test_robustness.py::test_memory_is_flat_over_epochs",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what ``SLOW`` names, before pytest deselects by markers."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
