"""The command that prepares: the same bytes however it ran, resume after kills, every refusal."""

import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import processors

from mlembed_jax.data import catalog, parquet_files, prepare, rows
from mlembed_jax.errors import DataError
from tests.material import entry, pairs, prepare_dataset, scored, train_tokenizer, write_files

ROOT = pathlib.Path(__file__).parent.parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
BITEXT = entry("bitext", 2, "Translate.")


def command(folder, *flags, out="dataset", manifest=None, tokenizer="tokenizer.json"):
  return [
    *(sys.executable, "-m", "mlembed_jax.prepare"),
    *("--manifest", str(manifest or folder / "manifest.json"), "--out", str(folder / out)),
    *("--tokenizer", str(folder / tokenizer), *flags),
  ]


def run(*args, **options):
  return subprocess.run(
    command(*args, **options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
  )


def content(out):
  """Returns a hash of each file, hidden ones too."""
  return {
    str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(out.rglob("*"))
    if path.is_file()
  }


def large(seed, size):
  """Returns columns of random words, so many that there is something to kill."""
  words = np.array([f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"])
  generator = np.random.default_rng(seed)
  texts = [" ".join(row) for row in words[generator.integers(0, len(words), (3 * size, 12))]]
  parts = dict(zip(("query", "passage", "negative_1"), np.split(np.array(texts), 3), strict=True))
  return {k: v.tolist() for k, v in parts.items()} | {"lang": ["en", "de"] * (size // 2)}


@pytest.fixture(scope="module")
def small(data, tmp_path_factory):
  """Two small files and a tokenizer, not prepared."""
  folder = tmp_path_factory.mktemp("small")
  files = {
    "train/a.parquet": (pairs(150, 2), BITEXT),
    "train/b.parquet": (scored(60), entry("scored_pairs", 0, "Compare.")),
  }
  write_files(folder, files)
  shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
  return folder


@pytest.fixture
def own(small, tmp_path):
  """A copy of `small` that a test may change."""
  shutil.copytree(small, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("dataset*"))
  return tmp_path


def change(folder, name, **fields):
  """Changes an entry of the manifest."""
  entries = json.loads((folder / "manifest.json").read_text())
  entries[name] |= fields
  (folder / "manifest.json").write_text(json.dumps(entries))


# The same bytes.


@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
  """Four files of 5,000 rows, prepared by one process without interruption."""
  folder = tmp_path_factory.mktemp("many")
  described = entry("bitext", 1, "Translate.")
  write_files(folder, {f"train/{k}.parquet": (large(k, 5000), described) for k in range(4)})
  shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
  prepare_dataset(folder)
  return folder


def descendants(pid):
  """Returns the processes below a process."""
  below = []
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = path.read_text().rpartition(")")[2].split()
    except OSError:
      continue
    if int(fields[1]) == pid:
      child = int(path.parent.name)
      below += [child, *descendants(child)]
  return below


def alive(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except OSError:
    return False


def wait_until(condition, seconds=60):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_a_command_that_was_killed_three_times_writes_the_same_bytes(many):
  """Killed while it reads, while it writes documents, and while it writes rows."""
  work = many / "killed/.work"
  for started, processes in (("chunks", 2), ("documents", 1), ("rows", 2)):
    arguments = command(many, "--processes", str(processes), out="killed")
    process = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    wait_until(lambda name=started: any((work / name).glob("*")))
    below = descendants(process.pid)
    assert process.poll() is None and len(below) >= processes * (processes > 1)
    process.kill()
    process.wait()
    assert not (many / "killed/catalog.json").exists()
    wait_until(lambda pids=below: not any(map(alive, pids)), 5)
  assert len(list(work.rglob("*.made"))) >= 4 + 8 + 1
  prepare_dataset(many, out="killed")
  assert content(many / "killed") == content(many / "dataset")


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.8, 1.5])  # workers import, then work
def test_a_terminal_that_interrupts_all_processes_gets_one_sentence(many, tmp_path, after_s):
  process = subprocess.Popen(
    command(many, "--processes", "2", out=tmp_path / "out"),
    cwd=ROOT,
    env=ENVIRONMENT,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,  # as a terminal does
  )
  wait_until(lambda: list(tmp_path.glob("out/.work/*")) or process.poll() is not None)
  time.sleep(after_s)
  os.killpg(process.pid, signal.SIGINT)
  _, said = process.communicate(timeout=60)
  assert process.returncode in (130, 0), said  # 0: it was faster
  assert "Traceback" not in said
  assert process.returncode == 0 or "stopped by signal 2; the same command goes on" in said


def test_leftovers_of_a_kill_right_before_the_end_are_cleared(own):
  prepare_dataset(own, out="expected")
  out = prepare_dataset(own)
  (out / ".work/chunks").mkdir(parents=True)
  (out / ".mlembed-train.array_record-00000-of-00002.123").write_bytes(b"half")
  prepare_dataset(own)
  assert content(out) == content(own / "expected")


@pytest.mark.parametrize("processes", [1, 2])
def test_two_runs_write_the_same_bytes(small, processes):
  first = prepare_dataset(small, out="dataset1")
  again = prepare_dataset(small, out=f"dataset_{processes}", processes=processes)
  assert content(first) == content(again) and len(content(first)) > 15


def test_the_bytes_depend_on_what_decides_them(own, monkeypatch):
  first = prepare_dataset(own, out="dataset1")
  fingerprints = {json.loads((first / "catalog.json").read_text())["fingerprint"]}
  columns = pairs(150, 2)
  columns["negative_2"][7] = "other"
  changes = (
    lambda: write_files(own, {"train/a.parquet": (columns, BITEXT)}),
    lambda: change(own, "train/a.parquet", instruction="Other."),
    lambda: train_tokenizer(500).save(str(own / "tokenizer.json")),
  )
  for k, do in enumerate(changes):
    do()
    out = prepare_dataset(own, out=f"other{k}")
    fingerprints.add(json.loads((out / "catalog.json").read_text())["fingerprint"])
  assert len(fingerprints) == 4


# The tokenizer of a folder.


@pytest.fixture
def model_folder(own):
  """A folder whose tokenizer.json ends every text with a token that is not our usual one."""
  (own / "model").mkdir()
  made = train_tokenizer(600)
  ends = [("<|im_end|>", made.token_to_id("<|im_end|>"))]
  made.post_processor = processors.TemplateProcessing(single="$A <|im_end|>", special_tokens=ends)
  made.save(str(own / "model/tokenizer.json"))
  return own / "model"


def test_a_folder_gives_its_tokenizer_and_says_what_ends_a_text(own, model_folder):
  expected = content(
    prepare_dataset(own, tokenizer=model_folder / "tokenizer.json", out="expected")
  )
  result = run(own, tokenizer="model")
  assert result.returncode == 0, result.stderr
  said = "note: texts end with <|im_end|>; train with --config.data.pooled_token='<|im_end|>'"
  assert said in result.stdout.splitlines()
  assert content(own / "dataset") == expected
  result = run(own, "--pooled_token", "<|endoftext|>", tokenizer="model", out="other")
  assert result.returncode == 0 and "texts end with" not in result.stdout
  result = run(own, "--pooled_token", "</s>", tokenizer="model", out="none")
  assert result.returncode == 1 and "model/tokenizer.json has no token '</s>'" in result.stderr


def test_a_folder_without_a_tokenizer_is_one_sentence(own, model_folder):
  (model_folder / "tokenizer.json").unlink()
  for name, message in (
    ("model", "error: --tokenizer: {} has no tokenizer.json; AutoTokenizer.from_pretrained(...)"),
    ("absent", "error: --tokenizer: E104 file: {} is no folder; a model of the Hub is hf:ORG/NAME"),
    ("absent.json", "error: {} does not exist; a folder without one gets it by"),
  ):
    result = run(own, tokenizer=name)
    assert result.stderr.startswith(message.format(own / name)), result.stderr
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1


# Running again.


def test_a_finished_folder_is_left_alone(own):
  out = prepare_dataset(own)
  times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
  prepare_dataset(own, processes=2)
  assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
  (own / "train").rename(own / "moved")  # where files lie decides nothing
  for name in ("a", "b"):
    change(own, f"train/{name}.parquet", path=f"moved/{name}.parquet")
  prepare_dataset(own)
  assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times


TIMES = "the times of train/a.parquet (a copy has a new one; `cp -p` keeps it)"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
  ("change_", "options", "named"),
  [
    (lambda f: write_files(f, {"train/a.parquet": (pairs(151, 2), BITEXT)}), {}, "files, inputs"),
    (lambda f: os.utime(f / "train/a.parquet", (1, 1)), {}, f"{TIMES} but not the sizes"),
    (lambda f: change(f, "train/a.parquet", instruction="Other."), {}, "files"),
    (lambda f: train_tokenizer(500).save(str(f / "tokenizer.json")), {}, "tokenizer"),
    (lambda _: None, {"max_tokens": 100}, "max_tokens"),
    (lambda _: None, {"pattern": "train/a*"}, "files, inputs"),
  ],
)
def test_a_folder_of_other_input_is_refused_with_the_difference(
  own, monkeypatch, finished, change_, options, named
):
  if not finished:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(prepare, "_write_rows", interrupt)
      prepare_dataset(own)
  else:
    prepare_dataset(own)
  before = content(own / "dataset")
  change_(own)
  with pytest.raises(DataError) as error:
    prepare_dataset(own, **options)
  assert f"{own}/dataset holds a dataset of other input: {named} differ; " in str(error.value)
  assert content(own / "dataset") == before


def interrupt(*_):
  raise KeyboardInterrupt


def test_a_command_that_was_killed_before_it_wrote_anything_goes_on(own):
  (own / "dataset/.work").mkdir(parents=True)
  prepare_dataset(own)


def test_a_command_that_finds_all_whole_leaves_one_that_is_at_work_alone(own, monkeypatch):
  """The other one looks at names and sizes alone, and so does not see what is written again."""
  name, read = "mlembed-documents.array_record-00000-of-00008", prepare._read_file
  prepare_dataset(own)
  before = (own / "dataset" / name).read_bytes()
  (own / "dataset" / name).write_bytes(bytes(len(before)))

  def second(job, number):
    made = read(job, number)
    with pytest.raises(DataError, match="another command is preparing"):
      prepare_dataset(own, quick=True)
    return made

  monkeypatch.setattr(prepare, "_read_file", second)
  prepare_dataset(own)
  assert (own / "dataset" / name).read_bytes() == before


def test_what_is_written_again_of_another_input_is_refused(own):
  """Its size and time are those of the input that the dataset was prepared of."""
  path, line = own / "train/a.jsonl", '{"query": "%s", "passage": "%s"}\n'
  path.write_text("".join(line % (f"q {i:02}", f"p {i:02}") for i in range(40)))
  (own / "manifest.json").write_text(json.dumps({"train/a.jsonl": entry("bitext", 0, "Find.")}))
  times, before = path.stat(), path.read_text()
  out = prepare_dataset(own)
  expected = content(out)
  for file in out.glob("*-documents.*"):
    file.unlink()
  path.write_text(before.replace("p 07", "p xx"))
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
  with pytest.raises(DataError, match="the input now gives other records than those"):
    prepare_dataset(own)
  with pytest.raises(DataError, match="is missing"):
    catalog.load_catalog(out)
  path.write_text(before)
  os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
  prepare_dataset(own)
  assert content(out) == expected


def test_two_commands_at_a_time_are_refused(own, monkeypatch):
  def second(*_):
    with pytest.raises(DataError, match="another command is preparing"):
      prepare_dataset(own)
    raise KeyboardInterrupt

  monkeypatch.setattr(prepare, "_read_file", second)
  with pytest.raises(KeyboardInterrupt):
    prepare_dataset(own)


def test_a_folder_that_holds_something_else_is_refused(own):
  (own / "dataset").mkdir()
  prepare_dataset(own)  # an empty one is fine
  (own / "notes").mkdir()
  (own / "notes/a.txt").write_text("mine")
  with pytest.raises(DataError, match=r"--out: .*notes holds files that are no dataset; name anot"):
    prepare_dataset(own, out="notes")
  assert content(own / "notes").keys() == {"a.txt"}


@pytest.mark.parametrize(
  ("value", "message"),
  [
    ("{", "catalog.json is not JSON: Expecting property name"),
    ("[]", "catalog.json: no JSON object. If it cannot be mended, delete the folder and prepare"),
    ('{"plan": 3}', "catalog.json is damaged: 'int' object is not subscriptable; restore it, or"),
    ('{"plan": {"version": 99}}', "was prepared by another version (99, this is 1); prepare it"),
  ],
)
def test_a_catalog_of_something_else_is_refused(own, value, message):
  (prepare_dataset(own) / "catalog.json").write_text(value)
  with pytest.raises(DataError) as error:
    prepare_dataset(own)
  assert message in str(error.value)


# Refusals.


def test_too_many_unusable_rows_stop_the_command_with_reasons_and_a_report(own):
  columns = pairs(150, 2)
  columns["passage"][:6] = [None] * 6
  columns["query"][149] = ""
  write_files(own, {"train/a.parquet": (columns, BITEXT)})
  result = run(own, "--processes", "1")
  assert result.returncode == 1 and "Traceback" not in result.stderr
  assert (
    "error: train/a.parquet: 7 of 150 rows cannot be used, more than --max_dropped_share=0.01 "
    "(empty in query: 1, e.g. row 149; null in passage: 6, e.g. row 0, 1, 2, 3, 4); mend the file "
    "or raise the share"
  ) in result.stderr
  report = json.loads((own / "dataset/prepare_report.json").read_text())
  assert report["files"]["train/a.parquet"]["dropped"] == 7
  reasons = report["files"]["train/a.parquet"]["dropped_by_reason"]
  assert reasons["null"] == {"rows": 6, "examples": [0, 1, 2, 3, 4], "columns": {"passage": 6}}
  assert not list((own / "dataset").glob("*array_record*"))
  out = prepare_dataset(own, max_dropped_share=0.05)
  assert (out / "catalog.json").is_file() and not (out / ".work").exists()


def test_rows_that_are_left_out_are_said_at_the_end_by_reason_and_column(own, capsys):
  columns = pairs(150, 2)
  columns["passage"][3], columns["negative_1"][3], columns["negative_1"][7] = None, None, None
  columns["query"][9] = " "
  write_files(own, {"train/a.parquet": (columns, BITEXT)})
  prepare_dataset(own)
  assert capsys.readouterr().out.endswith(
    "note: train/a.parquet: 3 of 150 rows are left out (empty in query: 1, e.g. row 9; "
    "null in passage (1), negative_1 (2): 2, e.g. row 3, 7)\n"
  )


def test_rows_that_all_fail_are_given_the_remedy_of_their_reason(own):
  write_files(own, {"train/a.csv": ({}, BITEXT | {"negatives": 0})})
  content = "query,passage\n" + "Grüße,greetings\n" * 3 + "a,b,c\n"
  (own / "train/a.csv").write_bytes(content.encode("windows-1252"))
  with pytest.raises(DataError, match="4 of 4 rows cannot be used") as error:
    prepare_dataset(own)
  assert str(error.value).endswith(
    "(bytes that are not UTF-8, or half a surrogate pair, in query: 3, e.g. row 0, 1, 2; another "
    "number of fields than the header: 1, e.g. row 3); if the file is not UTF-8, convert it, as by "
    "iconv -f WINDOWS-1252 -t UTF-8; put fields that hold the separator into quotes"
  )


def test_rows_whose_language_is_not_known_are_said(own, capsys):
  columns = pairs(150, 2)
  columns["lang"] = ["", "english", *columns["lang"][2:]]
  write_files(own, {"train/a.parquet": (columns, BITEXT)})
  prepare_dataset(own)
  said = capsys.readouterr().out
  assert (
    "note: train/a.parquet: rows of no known language (give a tag such as de as lang) count as "
    in said
  )
  assert "'english' 1, 'und' 1\n" in said


TASK = "Given a question, find the answer."


@pytest.mark.parametrize("form", ["\nQuery: ", "\nQuery:", "\r\nQuery: "])
def test_instructions_of_every_release_are_taken_off(own, capsys, form):
  columns = pairs(150, 2)
  bare = dict(columns)
  columns["query"] = [f"Instruct: {TASK}{form}{text}" for text in columns["query"]]
  described = BITEXT | {"instruction": TASK}
  write_files(own, {"train/a.parquet": (bare, described)})
  expected = content(prepare_dataset(own, out="bare"))
  instructed = described | {"query_has_instruction": True}
  write_files(own, {"train/a.parquet": (columns, instructed)})
  found = content(prepare_dataset(own, max_dropped_share=0.0))
  records = {name for name in expected if "array_record" in name}
  assert {name: found[name] for name in records} == {name: expected[name] for name in records}
  assert "note" not in capsys.readouterr().out


@pytest.mark.parametrize("has", [True, False])
def test_queries_that_are_not_as_the_manifest_says_are_counted_against_the_share(own, capsys, has):
  columns, begin = pairs(150, 2), "do not begin" if has else "begin"
  columns["query"] = [
    f"Instruct: {TASK}\nQuery: {text}" if (i < 5) != has else text
    for i, text in enumerate(columns["query"])
  ]
  described = BITEXT | {"query_has_instruction": has, "instruction": TASK}
  write_files(own, {"train/a.parquet": (columns, described)})
  said = (
    f"train/a.parquet: 5 of 150 queries {begin} with an instruction, but the manifest says "
    f"query_has_instruction: {str(has).lower()}"
  )
  with pytest.raises(DataError, match=f"{said}, which is more than --max_dropped_share=0.01"):
    prepare_dataset(own, max_dropped_share=0.01)
  prepare_dataset(own, max_dropped_share=0.05)
  assert f"note: {said}" in capsys.readouterr().out


def test_what_is_there_and_not_used_is_said(own):
  columns = pairs(150, 3) | {"passage_2": pairs(150, 3)["passage"]}
  columns["neg"] = columns["negative_3"]
  write_files(own, {"train/a.parquet": (columns, entry("bitext", 1, ""))})
  result = run(own, "--max_tokens", "3", "--max_dropped_share", "1")
  notes = [line for line in result.stdout.splitlines() if line.startswith("note: ")]
  assert notes[:3] == [
    "note: train/a.parquet: column passage_2 is not used, as the manifest says positives: 1",
    "note: train/a.parquet: columns negative_2 to negative_3 are not used, as the manifest says "
    "negatives: 1",
    "note: train/a.parquet: column neg is not used; negatives stand in negative_1, negative_2, ...",
  ], result.stderr
  assert len(notes) == 4 and "texts are longer than --max_tokens 3; the rest is" in notes[3]


def test_languages_under_another_name_are_refused_unless_the_manifest_has_them(own):
  columns = pairs(150, 2)
  columns["language"] = columns.pop("lang")
  write_files(own, {"train/a.parquet": (columns, BITEXT)})
  with pytest.raises(
    DataError, match=r"a\.parquet: column lang is missing; .*; rename language to "
  ):
    prepare_dataset(own)
  change(own, "train/a.parquet", lang="de")
  prepare_dataset(own)


def test_a_file_without_any_usable_row_is_refused_whatever_the_share(own):
  columns = pairs(20, 2) | {"passage": [" "] * 20}
  write_files(own, {"train/a.parquet": (columns, BITEXT)})
  with pytest.raises(DataError, match="20 of 20 rows cannot be used"):
    prepare_dataset(own, max_dropped_share=1.0)


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--pooled_token", "<|end|>"), "pooled_token: {folder}/tokenizer.json has no token '<|end|>'"),
    (("--files", "nothing/*"), "--files: 'nothing/*' matches no file of {folder}/manifest.json"),
    (("--manifest", "nosuch://m.json"), "nosuch://m.json: Protocol not known: nosuch"),
  ],
  ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_flags_end_with_one_sentence_and_no_work(small, flags, message):
  result = run(small, *flags, out="never")
  assert result.returncode == 1, result.stderr
  assert f"error: {message.format(folder=small)}" in result.stderr
  assert "Traceback" not in result.stderr and not (small / "never").exists()


@pytest.mark.parametrize("tokens", [1, 60_001])
def test_the_tokens_of_a_text_must_be_countable(own, tokens):
  message = f"--max_tokens: {tokens} is not between 2 and 60000"
  with pytest.raises(DataError, match=message):
    prepare_dataset(own, max_tokens=tokens)


def test_help_is_short_and_complete():
  arguments = [sys.executable, "-m", "mlembed_jax.prepare", "--help"]
  found = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
  assert found.returncode == 0 and len(found.stdout.splitlines()) < 60
  assert all(f"--{name}" in found.stdout for name in ("manifest", "tokenizer", "out", "files"))


def test_a_file_that_is_damaged_in_the_middle_stops_the_command_by_name(own):
  path = own / "train/a.parquet"
  data = path.read_bytes()
  path.write_bytes(data[: len(data) // 4] + b"\xff" * 64 + data[len(data) // 4 + 64 :])
  for processes in (1, 2):
    with pytest.raises(DataError, match=r"train/a\.parquet: damaged parquet file"):
      prepare_dataset(own, processes=processes)
  assert not list((own / "dataset/.work/chunks").glob(".*"))


def test_a_process_that_was_killed_is_said(many, monkeypatch):
  monkeypatch.setattr(prepare, "_read_file", kill_self)
  with pytest.raises(DataError, match=r"reading: a process was ended from outside, .* want of mem"):
    prepare_dataset(many, out="dying", processes=2)


def kill_self(*_):
  os.kill(os.getpid(), signal.SIGKILL)


# Inputs elsewhere.


def test_files_may_be_urls_or_in_archives(own):
  expected = prepare_dataset(own, out="expected")
  with zipfile.ZipFile(own / "all.zip", "w") as archive:
    for name in ("a", "b"):
      archive.write(own / f"train/{name}.parquet", f"in/{name}.parquet")
  change(own, "train/a.parquet", path=f"zip://in/a.parquet::file://{own}/all.zip")
  change(own, "train/b.parquet", path=f"file://{own}/train/b.parquet")
  shutil.move(own / "train/a.parquet", own / "moved.parquet")
  found, expected = content(prepare_dataset(own)), content(expected)
  # It also says of which version its inputs were.
  assert found.pop("catalog.json") != expected.pop("catalog.json")
  assert found == expected


def test_json_lines_give_the_same_records_as_parquet(own):
  columns = pairs(150, 2)
  lines = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
  (own / "train/a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  first = prepare_dataset(own, out="expected")
  change(own, "train/a.parquet", path="train/a.jsonl")
  second = prepare_dataset(own)
  records = [path.name for path in first.iterdir() if "array_record" in path.name]
  assert len(records) > 10
  assert all((first / n).read_bytes() == (second / n).read_bytes() for n in records)


def test_many_chunks_give_the_same_rows(own, monkeypatch):
  """The documents are the same bytes; rows are in more shards."""
  first = prepare_dataset(own, out="expected")
  monkeypatch.setattr(rows, "CHUNK", 40)
  second = prepare_dataset(own)
  for path in first.glob("mlembed-documents*"):
    assert path.read_bytes() == (second / path.name).read_bytes()
  assert len(list(second.glob("mlembed-train*.npy"))) == 4 + 2 > 2


def test_a_text_of_two_gigabytes_of_offsets_is_no_problem():
  """Texts have 64-bit offsets from the first step on."""
  assert parquet_files.cast(pa.table({"a": ["x"]}))[0]["a"].type == pa.large_string()
