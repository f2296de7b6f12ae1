"""Tries the statements of docs/compatibility.md about programs that need no parity.

    python -m tests.release.others WHOLE CUT

WHOLE and CUT are exported folders, the second of fewer dimensions. Environments are those of
tests.release.consumers, in `--root`. Prints a row for each statement; ends with status 1 where one
is not true, so that the page can be corrected. What cannot be installed is named, and skipped.
"""

import pathlib
from collections.abc import Iterator

from tests.release.consumers import NotInstalled, Row, end, make, new_parser, probe
from tests.release.programs import SENTENCE_TRANSFORMERS, TRANSFORMERS, Environment

OTHERS = (
  Environment(
    "newest",
    (SENTENCE_TRANSFORMERS, TRANSFORMERS),
    ("transformers", "sentence_transformers"),
    needs_torch=True,
  ),
  Environment(
    "txtai",
    ("txtai==9.14.0", SENTENCE_TRANSFORMERS, TRANSFORMERS),
    ("txtai",),
    needs_torch=True,
  ),
  Environment("mlx", ("mlx[cpu]==0.32.4", "mlx-embeddings==0.1.0"), ("mlx_embeddings",)),
  Environment(
    "quantize",
    ("onnxruntime==1.32.0", "onnx==1.23.2", "numpy==2.4.6"),
    ("quantize_dynamic",),
  ),
  Environment("indexes", ("usearch==2.26.6", "lancedb==0.40.0", "numpy==2.4.6"), ("indexes",)),
)


def rows(root: pathlib.Path, whole: pathlib.Path, cut: pathlib.Path) -> Iterator[Row]:
  """Yields a row for each statement of each program."""
  script = str(pathlib.Path(__file__).with_name("others_probe.py"))
  for environment in OTHERS:
    try:
      path = make(root, environment)
    except NotInstalled as error:
      said = f"skipped, as it cannot be installed: {error}"
      yield Row(environment.name, environment.title, said, True)
      continue
    for program in environment.programs:
      words = [str(path / "bin" / "python"), script, program, str(whole)]
      for statement, value in probe(words, cut, path / "hf").items():
        well = value is True
        said = f"{statement}  {'ok' if well else f'FAILED: {value}'}"
        yield Row(program, environment.title, said, well)


def main() -> None:
  parser = new_parser(__doc__)
  parser.add_argument("whole", type=pathlib.Path)
  parser.add_argument("cut", type=pathlib.Path)
  args = parser.parse_args()
  end(rows(args.root.absolute(), args.whole.absolute(), args.cut.absolute()))


if __name__ == "__main__":
  main()
