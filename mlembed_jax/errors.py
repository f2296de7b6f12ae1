"""Every error that names its own remedy. A command prints it without a traceback, status 1."""


class MlembedError(Exception):
  """Input that cannot be used, or a run that cannot go on; the message says why, and what to do."""


class ConfigError(MlembedError, ValueError):
  """A configuration, flag or workdir that cannot be used; the message names the field or flag."""


class OtherProcessError(ConfigError):
  """What another process of the same run raised; the message names that process."""


class HloError(ConfigError):
  """A compiled module in a form that the estimate does not understand."""


class DataError(MlembedError, ValueError):
  """Data that cannot be used; the message names the file and what to do."""


class LoadError(MlembedError, ValueError):
  """A folder that cannot be imported; the message names file, tensor, expected and found."""


class ExportError(MlembedError, ValueError):
  """A folder that cannot be written as asked; the message names the flag, file or tensor."""


class TrainingError(MlembedError, RuntimeError):
  """A run that cannot go on; the message names step and file."""


class StorageError(MlembedError, OSError):
  """A disk or folder that failed while it was read or written; the message names path and need."""
