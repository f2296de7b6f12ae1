"""What a run reads: every field of the data acts, and what cannot be read is refused at once."""

import functools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from mlembed_jax.config import flatten, from_mapping
from mlembed_jax.data import languages, plan, records
from mlembed_jax.errors import ConfigError, DataError
from mlembed_jax.parallel.sharding import make_mesh
from mlembed_jax.training import inputs, loop
from tests.material import (
  CONVENTIONS,
  config_dict,
  entry,
  pairs,
  prepare_dataset,
  scored,
  write_files,
)

STEPS = 12
TRANSLATE = entry("bitext", 4, "Translate.")


def uneven(rows):
  """Returns columns of which half the rows are German, a quarter Russian and so on."""
  columns = pairs(rows, 4)
  share = [
    next(
      (lang for k, lang in enumerate(("de", "ru", "hi")) if i % 2 ** (k + 1)),
      "zh" if i % 16 else "zho_Hans",
    )
    for i in range(rows)
  ]
  return columns | {"lang": share}


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
  """Two files with uneven languages, and another preparation of them."""
  folder = tmp_path_factory.mktemp("inputs")
  shutil.copytree(data / "heldout", folder / "heldout")
  shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
  described = json.loads((data / "manifest.json").read_text())
  kept = {name: value for name, value in described.items() if name.startswith("heldout")}
  for out, rows in (("other", 150), ("dataset", 160)):
    files = {
      "train/bitext.parquet": (uneven(rows), TRANSLATE),
      "train/search.parquet": (uneven(64), entry("retrieval", 4, "Find.")),
      "train/scored.parquet": (scored(40), entry("scored_pairs", 0, "Compare.")),
    }
    write_files(folder, files)
    prepare_dataset(folder, out=out)
  entries = json.loads((folder / "manifest.json").read_text())
  (folder / "manifest.json").write_text(json.dumps(entries | kept))
  return folder


def opened(folder, **fields):
  config = from_mapping(config_dict(folder, **fields))
  return config, inputs.load(config, pathlib.Path("/nowhere"))


def read(folder, **fields):
  """Returns everything that the first steps send to the devices."""
  config, found = opened(folder, **fields)
  batches = loop.make_batches(config, found, make_mesh(config), STEPS)
  made = []
  for step in range(STEPS):
    arrays = batches[step].arrays()
    sheets = jax.tree.leaves(arrays.sheets)
    made.append(
      (
        batches[step].dataset,
        [a.shape for a in sheets],
        [a.tobytes() for a in jax.tree.leaves(arrays)],
      )
    )
  return made


# Another value of each field, and others that it needs beside it.
OTHER = {
  "data.dataset": ("{folder}/other", {}),
  "data.train": (("train/[bs]*t*",), {}),
  "data.pooled_token": ("<|im_end|>", {}),
  "data.max_rows": (100, {}),
  "data.size_exponent": (0.5, {}),
  "data.language_temperature": (3.0, {}),
  "data.max_repeats": (1.5, {"data.language_temperature": 9.0}),
  "data.language_key": ("as-written", {}),
  "data.query_instructions": (False, {"data.document_instructions": 0.0}),
  "data.document_instructions": (0.6, {}),
  "data.global_batch": (8, {}),
  "data.complete_batches": (True, {}),
  "data.micro_batch": (512, {}),
  "data.lengths": ((64,), {}),
  "data.packing": (False, {}),
  "losses.bitext.negatives": (2, {}),
  "losses.retrieval.negatives": (2, {}),
  "train.seed": (1, {}),
}
ELSEWHERE = {
  "data.builder",  # tests/data/test_quickstart.py
  *("data.manifest", "data.heldout", "data.instructions"),  # below
  "data.kept_tokens",  # the same batches: tests/training/test_gradcache.py
  "data.workers",  # the same batches: tests/data/test_read_ahead.py
}


def test_no_field_is_forgotten():
  fields = {name for name in flatten(from_mapping(config_dict())) if name.startswith("data.")}
  assert fields == {name for name in OTHER if name.startswith("data.")} | ELSEWHERE


@pytest.fixture(scope="module")
def read_once(folder):
  return functools.cache(lambda fields: read(folder, **dict(fields)))


@pytest.mark.parametrize("field", OTHER)
def test_every_field_changes_what_is_read(folder, read_once, field):
  value, beside = OTHER[field]
  value = value.format(folder=folder) if isinstance(value, str) else value
  if field == "data.train":
    value = ("train/bitext*", "train/search*")
  before = read_once(tuple(beside.items()))
  assert read(folder, **beside, **{field: value}) != before


def test_the_same_fields_read_the_same(folder, read_once):
  assert read(folder) == read_once(())


def test_instructions_of_a_run_replace_those_of_the_manifest(folder, read_once, tmp_path):
  path = tmp_path / "instructions.json"
  path.write_text(json.dumps({"train/search.parquet": "Look up."}))
  given = {"data.instructions": str(path)}
  for before, now in zip(read_once(()), read(folder, **given), strict=True):
    assert (before != now) == (before[0] == "train/search.parquet")
  plans = [opened(folder, **fields)[1].plan.as_json() for fields in ({}, given)]
  assert plan.difference(*plans) == [
    "train/search.parquet: instruction: 'Find.' in the workdir, 'Look up.' now"
  ]
  path.write_text(json.dumps({"train/serach.parquet": "Look up."}))
  with pytest.raises(DataError, match=r"instructions\.json: 'train/serach\.parquet' is no file"):
    opened(folder, **given)


def test_lengths_beyond_what_was_prepared_are_refused(folder):
  prepare_dataset(folder, out="short", max_tokens=5)
  short = {"data.dataset": f"{folder}/short"}
  with pytest.raises(ConfigError, match=r"data\.lengths: 64 .* 5 tokens .* --max_tokens 63"):
    opened(folder, **short)
  opened(folder, **short, **{"data.lengths": (6,)})


def test_held_out_files_are_those_of_the_manifest(folder):
  _, found = opened(folder)
  assert [task.name for task in found.tasks] == [
    "heldout/bitext.parquet",
    "heldout/colours.parquet",
  ]
  _, found = opened(folder, **{"data.heldout": ("heldout/c*",)})
  assert [task.name for task in found.tasks] == ["heldout/colours.parquet"]
  _, found = opened(folder, **{"data.heldout": (), "data.manifest": ""})
  assert found.tasks == []


def test_the_tokens_of_a_step_are_those_of_its_texts_and_used_negatives(folder):
  """A mean over an epoch, from the counts beside the records."""
  _, found = opened(folder, **{"losses.bitext.negatives": 2})
  assert found.used_negatives == {
    "train/bitext.parquet": 0.5,
    "train/search.parquet": 1.0,
    "train/scored.parquet": 0.0,
  }
  shards = json.loads((folder / "dataset/catalog.json").read_text())["shards"]["train"]
  paths = sorted((folder / "dataset").glob("mlembed-train*.lengths.npy"))
  total = 0.0
  for shard, path in zip(shards, paths, strict=True):
    counts = np.load(path).astype(int)
    total += counts[:, :2].sum() + counts[:, 2:].sum() * found.used_negatives[shard["file"]]
  assert found.tokens_per_step == pytest.approx(total / found.plan.order().steps_per_epoch)


def test_steps_follow_epochs_and_the_warm_up_must_fit(folder):
  config, found = opened(folder, **{"train.steps": 0, "train.epochs": 2.5})
  per_epoch = found.plan.order().steps_per_epoch
  assert inputs.steps(config, found) == round(2.5 * per_epoch)
  config, found = opened(folder, **{"train.steps": 7})
  assert inputs.steps(config, found) == 7
  config, found = opened(folder, **{"train.steps": 3})
  with pytest.raises(ConfigError, match=r"warmup_steps: 4 is longer than the run, 3 steps"):
    inputs.steps(config, found)


def test_a_file_below_one_batch_is_completed_where_that_is_asked_for(folder):
  """The rows of a batch beyond a file's 40 are those it begins with."""
  fields = {"data.global_batch": 64, "data.complete_batches": True}
  config, found = opened(folder, **fields, **{"data.train": ("train/scored*",)})
  assert found.plan.order().steps_per_epoch == 1
  batch = loop.make_batches(config, found, make_mesh(config), 1)[0]
  rows, counts = np.unique(batch.rows, return_counts=True)
  assert len(batch.rows) == 64 and set(counts) == {1, 2}
  units = found.plan.units
  assert len(rows) == sum(unit.rows for unit in units) < 64
  tokens = sum(unit.rows * unit.tokens for unit in units)
  assert found.tokens_per_step == pytest.approx(64 * tokens / len(rows))


def test_a_run_records_what_decides_its_rows(folder):
  config, found = opened(folder)
  run = inputs.describe(config, found)
  catalog = json.loads((folder / "dataset/catalog.json").read_text())
  assert run.plan["dataset"] == catalog["fingerprint"] and run.plan["teacher"] == ""
  per_epoch = {name: rows for name, (rows, _) in run.plan["units"].items()}
  assert sum(per_epoch.values()) == sum(s["written"]["records"] for s in catalog["shards"]["train"])
  assert run.datasets["train/bitext.parquet"] == TRANSLATE


@pytest.mark.parametrize(
  ("fields", "error", "message"),
  [
    ({"data.train": ("nothing/*",)}, DataError, r"data\.train: 'nothing/\*' matches no file of .*"),
    ({"data.heldout": ("none",)}, DataError, r"data\.heldout: 'none' matches no file of"),
    (
      {"data.heldout": ("train/bitext*",)},
      DataError,
      r"columns text, en are missing; it has query",
    ),
    ({"data.pooled_token": "<|x|>"}, DataError, r"pooled_token: .*has no token '<\|x\|>'"),
    (
      {"data.pooled_token": "a"},
      ConfigError,
      r"pooled_token: .* 'a' outside of added_tokens",
    ),
    ({"data.global_batch": 64}, DataError, r"has fewer of its rows than data\.global_batch = 64"),
    ({"model.vocab": 500}, ConfigError, r"model\.vocab: 500 rows are fewer than the \d+ tokens of"),
  ],
)
def test_what_cannot_be_read_is_refused_by_field(folder, fields, error, message):
  with pytest.raises(error, match=message):
    opened(folder, **fields)


# One language, one name.


@pytest.fixture(scope="module")
def spelled(data, tmp_path_factory):
  """The same rows, of 16 uneven languages, with tags in one convention and in three."""
  found = {}
  for name, conventions in (("one", [tags[:1] for tags in CONVENTIONS]), ("three", CONVENTIONS)):
    found[name] = folder = tmp_path_factory.mktemp(name)
    shutil.copyfile(data / "tokenizer.json", folder / "tokenizer.json")
    columns, rows = pairs(480, 4), 480
    mine = [conventions[int(len(conventions) * (i / rows) ** 2)] for i in range(rows)]
    columns["lang"] = [tags[i % len(tags)] for i, tags in enumerate(mine)]
    write_files(folder, {"train/bitext.parquet": (columns, TRANSLATE)})
    prepare_dataset(folder)
  return found


def planned(folder, language_key="language-script"):
  """Returns language -> (rows, rows of an epoch)."""
  fields = {"data.language_temperature": 3.33, "data.language_key": language_key}
  fields |= {"data.heldout": (), "data.manifest": ""}
  _, found = opened(folder, **fields)
  made = found.plan
  return {u.language: (u.rows, int(n)) for u, n in zip(made.units, made.per_epoch, strict=True)}


def test_tags_of_three_conventions_have_the_shares_of_one_spelling(spelled):
  one, three = planned(spelled["one"]), planned(spelled["three"])
  assert one == three and len(one) == len(CONVENTIONS)
  written = planned(spelled["three"], "as-written")
  assert len(written) == 3 * len(CONVENTIONS)
  total = sum(count for _, count in one.values())
  merged = {key: 0 for key in one}
  for tag, (_, count) in written.items():
    merged[languages.language_key(tag)] += count
  moved = sum(abs(merged[key] - count) for key, (_, count) in one.items()) / 2 / total
  assert merged != {key: count for key, (_, count) in one.items()}, moved


def test_rows_of_merged_tags_all_come_once_and_keep_their_tags(spelled):
  fields = {"data.heldout": (), "data.manifest": "", "data.max_repeats": 1.0}
  _, found = opened(spelled["three"], **fields)
  split, tags = found.split, set()
  for number, unit in enumerate(split.units):
    places = split.rows.place(np.full(unit.rows, number), np.arange(unit.rows))
    assert len(set(places)) == unit.rows
    messages = [split.queries[place] for place in places]
    own = {row.language for _, row in map(records.decode_record, messages)}
    assert {languages.language_key(tag) for tag in own} == {unit.language}
    tags |= own
  assert tags == {tag for tags in CONVENTIONS for tag in tags}


def test_merges_are_printed_and_written(spelled, tmp_path, capsys):
  _, found = opened(spelled["three"], **{"data.heldout": (), "data.manifest": ""})
  inputs.report(found, 12, tmp_path)
  assert "counted as one language:\n" in (printed := capsys.readouterr().out)
  assert "  heb-Hebr: he, heb_Hebr, iw\n" in printed
  written = json.loads((tmp_path / "plan.json").read_text())["merged"]
  assert written["heb-Hebr"] == ["he", "heb_Hebr", "iw"] and len(written) == len(CONVENTIONS)
  prepared = json.loads((spelled["three"] / "dataset/prepare_report.json").read_text())
  assert prepared["merged"] == written
  prepare_dataset(spelled["three"], out="again")
  assert "  heb-Hebr: he, heb_Hebr, iw\n" in capsys.readouterr().out
  _, found = opened(spelled["one"], **{"data.heldout": (), "data.manifest": ""})
  inputs.report(found, 12, tmp_path)
  assert "counted as one" not in capsys.readouterr().out
  assert json.loads((tmp_path / "plan.json").read_text())["merged"] == {}
