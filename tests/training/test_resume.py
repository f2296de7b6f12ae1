"""What the flags of a start ask for, and what of that earlier starts have done."""

import dataclasses

import pytest

from mlembed_jax.errors import ConfigError
from mlembed_jax.training.resume import Resume, changed_settings, parse_steps

BACK = {"step": 10, "from_step": 10, "skip_steps": [12, 13]}


@pytest.mark.parametrize(
  ("asked", "remains"),
  [
    (Resume(from_step=10, skip_steps=(12, 13)), Resume()),
    (Resume(from_step=10), Resume()),
    (Resume(from_step=5), Resume(from_step=5)),
    (Resume(from_step=10, skip_steps=(12, 15)), Resume(from_step=10, skip_steps=(15,))),
    (Resume(from_step=10, skip_steps=(13, 25)), Resume(skip_steps=(25,))),
  ],
  ids=["the same command", "back alone", "further back", "steps done since", "steps to come"],
)
def test_a_repeated_command_does_what_is_not_done(asked, remains):
  assert asked.remaining([BACK], latest=20, same_settings=True) == remains


def test_a_run_goes_back_once_more_for_another_rate():
  resume = Resume(from_step=10)
  assert resume.remaining([BACK], latest=20, same_settings=False) == resume


def test_a_step_before_the_last_return_is_no_repetition():
  history = [BACK, {"step": 5, "from_step": 5}]
  resume = Resume(from_step=10)
  assert resume.remaining(history, latest=20, same_settings=True) == resume


def test_steps_are_numbers_and_ranges():
  assert parse_steps("15,12-13,12") == (12, 13, 15)


@pytest.mark.parametrize("text", ["a", "4-3", "-4", "²", "1-", "1-2-3", "1-99999999999"])
def test_what_names_no_steps_is_refused(text):
  with pytest.raises(ConfigError, match=r"^--skip_steps: "):
    parse_steps(text)


def test_a_run_goes_back_once_more_for_another_length(tiny):
  longer = dataclasses.replace(tiny, train=dataclasses.replace(tiny.train, steps=40))
  assert changed_settings(tiny, longer) == {"train.steps": [tiny.train.steps, 40]}
  assert Resume().entry(tiny, longer, 20) == {"step": 20, "train.steps": [tiny.train.steps, 40]}
  assert changed_settings(tiny, tiny) == {} and Resume().entry(tiny, tiny, 20) is None
