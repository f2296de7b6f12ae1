"""What a start still has to do of its flags, which launchers repeat."""

import pytest

from mlembed_jax.config import from_mapping
from mlembed_jax.training.resume import Resume
from tests.material import config_dict

BACK = {"step": 40, "from_step": 40, "skip_steps": [42]}


def config(rate=1e-3):
  return from_mapping(config_dict(None, **{"optimizer.learning_rate": rate}))


@pytest.mark.parametrize(
  ("resume", "rate", "from_step", "skip_steps"),
  [
    (Resume(from_step=40, skip_steps=(42,)), 1e-3, None, ()),  # the same command again
    (Resume(from_step=40, skip_steps=(42, 43)), 1e-3, 40, (43,)),
    (Resume(from_step=40), 1e-4, 40, ()),
    (Resume(from_step=20), 1e-3, 20, ()),
  ],
)
def test_a_run_goes_back_to_a_step_once_more_for_something_new(resume, rate, from_step, skip_steps):
  found = resume.remaining([BACK], config(), config(rate))
  assert (found.from_step, found.skip_steps) == (from_step, skip_steps)


def test_a_step_before_the_last_return_is_no_repetition():
  history = [BACK, {"step": 20, "from_step": 20}]
  assert Resume(from_step=40).remaining(history, config(), config()).from_step == 40
