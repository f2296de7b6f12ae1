"""`--config tests/tiny_config.py:DATA_FOLDER`: the tests' tiny run as a configuration file."""

import pathlib

from tests.material import config_dict


def get_config(data: str):
  return config_dict(pathlib.Path(data), **{"train.keep_checkpoints": 10})
