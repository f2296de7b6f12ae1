"""The command that encodes files, run as a process, killed and run again."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlembed_jax import encode, vector_parts
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.inference import Encoder
from mlembed_jax.quantize import quantize, ranges
from tests.material import sentences

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = [*sentences("de"), *sentences("zh")]


def command(folder, out, source, *more):
  flags = f"--model={folder}", f"--input={source}", f"--out={out}"
  return [sys.executable, "-m", "mlembed_jax.encode", *flags, "--part=64", *more]


def run(folder, out, source, *more, stdin=None):
  return subprocess.run(
    command(folder, out, source, *more),
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    input=stdin,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.fixture(scope="module")
def full(exported):
  return exported["full"]


@pytest.fixture(scope="module")
def expected(full):
  return Encoder.load(full).encode(TEXTS, depth=1, dim=16)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
  file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
  file.write_text("\n".join(json.dumps({"title": text}) for text in TEXTS))
  return file


CUT = ("--depth=1", "--dim=16", "--column=title")


def test_a_killed_command_goes_on(full, jsonl, expected, tmp_path):
  out = tmp_path / "vectors.npy"
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  first = subprocess.Popen(command(full, out, jsonl, *CUT), cwd=ROOT, env=environment)
  parts = tmp_path / "vectors.npy.parts"
  while not (found := list(parts.glob("0*.npy"))) and first.poll() is None:
    time.sleep(0.005)
  first.send_signal(signal.SIGKILL)
  first.wait()
  assert found and not out.exists()
  written = found[0].stat().st_mtime_ns
  done = run(full, out, jsonl, *CUT)
  assert done.returncode == 0, done.stderr
  assert f"{len(TEXTS):,} vectors: {out}" in done.stdout
  np.testing.assert_allclose(np.load(out), expected, atol=1e-5)
  assert not parts.exists() and written < out.stat().st_mtime_ns


def test_a_part_of_other_settings_is_not_taken(full, jsonl, expected, tmp_path):
  out = tmp_path / "vectors.npy"
  parts = tmp_path / "vectors.npy.parts"
  parts.mkdir()
  np.save(parts / f"{0:08d}-{'0' * 24}.npy", np.zeros((64, 16), np.float32))
  assert run(full, out, jsonl, *CUT).returncode == 0
  np.testing.assert_allclose(np.load(out), expected, atol=1e-5)


def without_ranges(folder, target):
  """Returns a copy of an exported folder as version 0.1.0 wrote it, without ranges."""
  shutil.copytree(folder, target)
  own = json.loads((target / "mlembed.json").read_text())
  del own["ranges_file"]
  (target / "mlembed.json").write_text(json.dumps(own))
  return target


@pytest.mark.parametrize("of_model", [True, False])
def test_parquet_in_and_out_with_ranges_of_the_model_or_the_first_part(
  full, expected, of_model, tmp_path
):
  pq.write_table(pa.table({"title": TEXTS}), tmp_path / "texts.parquet")
  out = tmp_path / "vectors.parquet"
  model = full if of_model else without_ranges(full, tmp_path / "model")
  flags = (*CUT, "--precision=int8", "--part=128")
  done = run(model, out, tmp_path / "texts.parquet", *flags)
  assert done.returncode == 0, done.stderr
  found = np.array(pq.read_table(out)["vector"].to_pylist(), np.int8)
  of = np.load(tmp_path / "vectors.ranges.npy")
  wanted = Encoder.load(full).ranges(1, 16) if of_model else ranges(expected[:128])
  np.testing.assert_allclose(of, wanted, atol=1e-6)
  difference = np.abs(found.astype(int) - quantize(expected, "int8", of))
  assert difference.max() <= 1  # on the edge of a level
  if of_model:  # vectors that are not rounded would take away the ranges of these
    content = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = run(model, tmp_path / "vectors.npy", tmp_path / "texts.parquet", *CUT)
    assert done.returncode == 1 and "vectors.parquet, which stands beside" in done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == content


def test_coordinates_beyond_their_ranges_are_spoken_of(full, expected, tmp_path):
  pq.write_table(pa.table({"text": TEXTS}), tmp_path / "texts.parquet")
  found = ranges(expected)
  for factor, said in ((1, ""), (0.25, "coordinates lie beyond their ranges")):
    np.save(tmp_path / "narrow.npy", (found * factor).astype(np.float32))
    flags = (*CUT, "--column=text", "--precision=int8", f"--ranges={tmp_path / 'narrow.npy'}")
    done = run(full, tmp_path / f"v{factor}.npy", tmp_path / "texts.parquet", *flags)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr and ("note" in done.stderr) == bool(said)
  narrow = np.load(tmp_path / "narrow.npy")
  beyond = ((expected < narrow[0]) | (expected > narrow[1])).mean()
  assert f"note: {beyond:.0%} of" in done.stderr
  repeated = pa.table({"text": TEXTS[:10] * 20})  # every tenth has the end of each range
  pq.write_table(repeated, tmp_path / "texts.parquet")
  model = without_ranges(full, tmp_path / "model")
  flags = (*CUT, "--column=text", "--precision=int8", "--part=200")
  done = run(model, tmp_path / "r.npy", tmp_path / "texts.parquet", *flags)
  assert done.returncode == 0 and "note" not in done.stderr, done.stderr


FIRST, SECOND = (np.array([[-end] * 4, [end] * 4], np.float32) for end in (1, 2))


@pytest.mark.parametrize(
  ("there", "precision", "given", "fits"),
  [
    (FIRST, "int8", FIRST, True),
    (FIRST, "uint8", FIRST, True),
    (FIRST, "int8", SECOND, False),
    (FIRST, "int8", None, False),  # those of the first part are not known yet
    (FIRST, "float32", None, False),
    (None, "int8", FIRST, False),
    (None, "float32", None, True),
    (None, "binary", None, True),
  ],
)
@pytest.mark.parametrize("suffixes", [(".npy", ".parquet"), (".parquet", ".npy")])
def test_vectors_are_never_left_with_ranges_of_their_sibling(
  suffixes, there, precision, given, fits, tmp_path
):
  first, second = (tmp_path / f"v{suffix}" for suffix in suffixes)
  encode.write_ranges(there, first)
  encode.check_ranges(second, precision, given)
  first.write_bytes(b"vectors")
  encode.check_ranges(first, precision, given)  # which are replaced, with their ranges
  if fits:
    return encode.check_ranges(second, precision, given)
  with pytest.raises(ConfigError, match=rf"^--out: {first}.* v.ranges.npy; choose another name"):
    encode.check_ranges(second, precision, given)


def test_ranges_of_an_earlier_run_are_removed_with_its_vectors(tmp_path):
  out = tmp_path / "v.npy"
  encode.write_ranges(FIRST, out)
  np.testing.assert_array_equal(np.load(tmp_path / "v.ranges.npy"), FIRST)
  out.write_bytes(b"vectors")
  encode.write_ranges(FIRST, out)
  assert out.exists()
  encode.write_ranges(None, out)
  assert not list(tmp_path.iterdir())


def test_ranges_of_few_texts_are_refused(full, tmp_path):
  model = without_ranges(full, tmp_path / "model")
  done = run(model, tmp_path / "v.npy", "-", "--precision=int8", stdin="one\ntwo")
  assert done.returncode == 1 and not (tmp_path / "v.npy").exists()
  assert "error: --precision: int8 needs ranges of at least 100 texts" in done.stderr
  assert "the first part has 2" in done.stderr


def test_lines_are_read_from_a_pipe(full, expected, tmp_path):
  out = tmp_path / "vectors.npy"
  done = run(full, out, "-", *CUT[:2], "--precision=binary", stdin="\n".join(TEXTS))
  assert done.returncode == 0, done.stderr
  np.testing.assert_array_equal(np.load(out), quantize(expected, "binary"))


@pytest.mark.parametrize(
  ("lines", "flags", "message"),
  [
    (['{"title": "a"}', '{"title": 3}'], (), "line 2: a text is expected, found int"),
    (['{"title": "a"}', "{"], (), "line 2: Expecting property name"),
    (['{"text": "a"}'], (), "--column: .*line 1 has no field 'title'; it has text"),
    (['{"title": "a", "title": "b"}'], (), "line 1: 'title' stands there twice; keep one"),
    ([], ("--input=-",), "--column: - has a text per line, and no columns; drop the flag"),
    ([], ("--input=a.txt.gz",), "--column: a.txt.gz has a text per line"),
    (['"a"'], ("--prompt=a", "--prompt_name=query"), "--prompt, --prompt_name: only one can"),
    ([], (), "--input: .* has no texts"),
    (['"a"'], ("--depth=2",), "error: --depth: 2 was not trained; the nearest are 1, 3"),
    (['"a"'], ("--prompt_name=nope",), "error: --prompt_name: 'nope' is no prompt"),
    (
      ['"a"'],
      ("--dim=20", "--untrained", "--precision=binary"),
      "--precision: binary needs dims in",
    ),
    (
      ['"a"'],
      (f"--ranges={__file__}", "--precision=int8"),
      "error: --ranges: .*test_encode.py cannot be read: ",
    ),
    (['"a"'], ("--out=x.txt",), "--out: .*x.txt ends neither in .npy nor in .parquet"),
    (['"a"'], ("--out=v.ranges.npy",), "--out: .*v.ranges.npy is a name of ranges"),
    (['"a"'], ("--model=/absent",), "error: E104 file: /absent is no folder"),
    (['"a"'], ("--input=absent.jsonl",), "--input: absent.jsonl does not exist"),
    (['"a"'], (f"--out={__file__}/v.npy",), "--out: .*v.npy cannot be written: File exists"),
  ],
)
def test_bad_input_is_one_sentence(lines, flags, message, full, tmp_path):
  (tmp_path / "texts.jsonl").write_text("\n".join(lines))
  done = run(full, tmp_path / "v.npy", tmp_path / "texts.jsonl", "--column=title", *flags)
  assert done.returncode == 1
  last = done.stderr.strip().splitlines()[-1]
  assert re.search(message, last), done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]


@pytest.mark.parametrize("text", [3, None, "cut emoji \ud83d"])
def test_what_is_no_text_is_named_before_anything_is_encoded(full, text):
  with pytest.raises(DataError, match=r"^texts\[3\] is no text: "):
    Encoder.load(full).encode(["a", "b", "c", text])


def test_what_vectors_would_replace_is_kept(full, tmp_path):
  texts = tmp_path / "texts.parquet"
  pq.write_table(pa.table({"text": TEXTS[:2]}), texts)
  (tmp_path / "v.npy").mkdir()
  for out, message in ((texts, "is also --input"), (tmp_path / "v.npy", "is a folder")):
    done = run(full, out, texts)
    assert done.returncode == 1 and done.stderr.startswith("error: --out: "), done.stderr
    assert message in done.stderr
  assert pq.read_table(texts)["text"].to_pylist() == TEXTS[:2]


def test_what_is_beside_vectors_and_not_of_them_is_kept(full, tmp_path):
  notes, parts = tmp_path / "a.npy.json", tmp_path / "b.npy.parts"
  notes.write_text('["notes"]')
  parts.mkdir()
  (parts / "thesis.txt").write_text("mine")
  for name, source, said in [
    ("a.npy", notes, "a.npy.json is also --input, which it would replace"),
    ("a.npy", "-", "a.npy.json would be replaced, and is not what `encode` wrote; remove it"),
    ("b.npy", "-", "b.npy.parts, which is removed at the end, holds thesis.txt"),
  ]:
    done = run(full, tmp_path / name, source, stdin="one")
    assert done.returncode == 1 and f"error: --out: {tmp_path}" in done.stderr, done.stderr
    assert said in done.stderr
  assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.npy.json", "b.npy.parts", "thesis.txt"]


def test_a_second_command_waits_for_nothing_and_changes_nothing(tmp_path):
  out = tmp_path / "v.npy"
  first, second = vector_parts.Parts(out), vector_parts.Parts(out)
  with first.held():
    with pytest.raises(ConfigError, match=r"another command is writing .*v\.npy\.parts; wait"):
      second.held().__enter__()
    assert first.folder.is_dir()
  assert not list(tmp_path.iterdir())
