"""Fixtures for the whole suite, and a fast compiler: the suite compiles many small programs once each."""

import collections
import itertools
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from train.quick_compile import compile_quickly

compile_quickly()
from train import loop  # noqa: E402  after the flags of the compiler

# For the workers: threads of BLAS wait for each other on small matrices.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_finished = itertools.count()

# Of these tests the suite runs the first cases only, of conformance tests those of every mechanism; `--all_cases` runs
# all of them. What is left out repeats a check at other sizes or on variants of a mechanism, or (0) one made elsewhere:
# that no mechanism's step holds anything quadratic is seen in `test_compiled_step.py`.
QUICK_CASES = {
  "test_a_branch_is_a_shorter_run": 0,
  "test_a_killed_process_and_a_resume_of_all": 0,
  "test_a_layer_starts_as_the_identity_and_learns": 1,
  "test_a_model_trains_with_it": 1,
  "test_a_restored_run_goes_on_bit_for_bit": 2,
  "test_a_stack_of_three_mechanisms_is_recovered_and_has_the_gradient_of_autodiff": 0,
  "test_blocks_equal_the_states_of_all_tokens": 1,
  "test_blocks_of_three_and_six_equal_the_reference": 1,
  "test_chunks_with_documents": 1,
  "test_conformance_claims_hold": 1,
  "test_conformance_claims_hold_of_hybrids": 0,
  "test_cost_counts_the_products_that_run": 1,
  "test_decode_after_a_long_first_piece": 1,
  "test_decoding_in_pieces_of_any_size_gives_the_whole": 2,
  "test_every_framework_is_shown_and_its_claims_hold": 0,
  "test_every_mechanism_is_recovered_bit_for_bit": 1,
  "test_every_mechanism_takes_the_same_steps_on_a_mesh": 1,
  "test_extreme_inputs_stay_finite": 1,
  "test_features": 1,
  "test_frozen_levels_keep_tables_and_coarse_digits": 1,
  "test_gradients_and_curvature_equal_the_definition_in_float64": 1,
  "test_gradients_can_be_differentiated": 0,
  "test_greedy_ids_equal_the_full_forward_on_every_prefix": 1,
  "test_hessian_vector_products_see_through_the_reconstruction": 1,
  "test_latest_token_of_a_leaf": 1,
  "test_long_ragged_pieces_decode_like_the_whole": 1,
  "test_memory_and_loops_do_not_grow_with_pairs": 0,
  "test_memory_grows_linearly_with_length": 0,
  "test_memory_grows_linearly_with_the_sequence": 0,
  "test_memory_options_change_no_number": 2,
  "test_one_compilation_per_shape": 1,
  "test_processes_that_do_not_fit_together_all_stop": 0,
  "test_products_are_symmetric_and_the_modes_agree": 1,
  "test_prompts_longer_than_a_piece_beside_short_ones": 2,
  "test_reconstructing_gives_the_gradient_of_autodiff": 1,
  "test_resolvent": 1,
  "test_second_derivatives_go_forward_over_reverse": 0,
  "test_shapes_dtypes_and_finiteness": 1,
  "test_snippets_run": 4,
  "test_the_compiled_program_is_as_small": 2,
  "test_the_kernel_lowers_without_square_arrays_for": 1,
  "test_the_same_twenty_steps_everywhere": 3,
  "test_tiles": 1,
  "test_training_memory_grows_linearly": 0,
  "test_training_memory_grows_linearly_with_length": 0,
  "test_training_memory_is_a_small_multiple_of_the_activations": 0,
  "test_training_memory_of_floating_values_grows_with_the_length_not_its_square": 0,
  "test_training_memory_stays_below_one_score_matrix": 0,
  "test_what_else_grows_with_depth": 0,
}


def pytest_addoption(parser):
  parser.addoption("--all_cases", action="store_true", help="also run the repeats that the quick suite leaves out")


def pytest_collection_modifyitems(config, items):
  if config.getoption("--all_cases") or any("[" in arg for arg in config.args):
    return
  seen, kept, dropped = collections.Counter(), [], []
  for item in items:
    limit = QUICK_CASES.get(item.originalname)
    group = item.path.name, item.originalname, _mechanism(item)
    seen[group] += 1
    (kept if limit is None or seen[group] <= limit else dropped).append(item)
  items[:] = kept
  config.hook.pytest_deselected(items=dropped)


def _mechanism(item) -> str:
  """The name before the options of a variant in conformance tests; one group for anything else."""
  if item.originalname not in ("test_conformance_claims_hold", "test_shapes_dtypes_and_finiteness"):
    return ""
  return item.callspec.params["attention"].split("(")[0]


@pytest.fixture(scope="session", autouse=True)
def no_collection_before_training():
  """A run collects garbage once, which takes half a second with all that a worker holds."""
  with pytest.MonkeyPatch.context() as m:
    m.setattr(loop, "gc", SimpleNamespace(collect=lambda: 0, freeze=lambda: None, unfreeze=lambda: None))
    yield


@pytest.fixture(autouse=True)
def few_memory_maps():
  """Drops compiled programs before a worker holds so many that the kernel refuses to map another one (65530)."""
  yield
  maps = Path("/proc/self/maps")
  if next(_finished) % 10 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
    jax.clear_caches()


@pytest.fixture
def key():
  return jax.random.key(0)
