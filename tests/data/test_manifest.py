"""Manifests: which files are chosen, where they lie, and every refusal by file and field."""

import json
import zipfile

import fsspec
import pytest

from mlembed_jax.data import manifest
from mlembed_jax.data.manifest import File
from mlembed_jax.errors import DataError
from tests.material import entry

BITEXT = entry("bitext", 4, "Translate.")
NAMES = ("train/b.parquet", "train/a.parquet", "train/c.parquet", "heldout/a.parquet")


@pytest.fixture
def write(tmp_path):
  """Returns what writes a manifest of four files, changed by name, and returns its path."""

  def save(changes=(), name="manifest.json", folder=tmp_path):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(dict.fromkeys(NAMES, BITEXT) | dict(changes)), encoding="utf-8")
    return str(path)

  return save


def names(files):
  return [file.name for file in files]


def test_patterns_choose_files_in_the_order_of_the_manifest(write):
  chosen = manifest.select(write(), ("train/a*", "train/[bc]*", "train/a*"), "--files")
  assert names(chosen) == ["train/b.parquet", "train/a.parquet", "train/c.parquet"]


def test_each_pattern_must_match_a_file(write):
  with pytest.raises(DataError, match=r"--files: 'trian/\*' matches no file of .*; it lists train"):
    manifest.select(write(), ("train/*", "trian/*"), "--files")


def test_several_manifests_add_their_files(write, tmp_path):
  other = write({"train/d.parquet": BITEXT}, folder=tmp_path / "other")
  (tmp_path / "other/manifest.json").write_text(json.dumps({"train/d.parquet": BITEXT}))
  files = manifest.select_all([write(), other], ["train/*"], "--files")
  assert names(files) == [*NAMES[:3], "train/d.parquet"]
  assert files[-1].path == f"{tmp_path}/other/train/d.parquet"


def test_one_name_in_two_manifests_is_refused_with_both(write, tmp_path):
  both = [write(), write(folder=tmp_path / "other")]
  with pytest.raises(
    DataError, match=r"other/manifest\.json and .* both have train/b\.parquet; "
  ) as e:
    manifest.select_all(both, ["train/*"], "--files")
  assert f"the manifest in {tmp_path} " in str(e.value) and "`path` says where" in str(e.value)


def test_a_name_that_stands_twice_is_refused(tmp_path):
  path = tmp_path / "manifest.json"
  path.write_text(f'{{"a.parquet": {json.dumps(BITEXT)}, "a.parquet": {json.dumps(BITEXT)}}}')
  with pytest.raises(DataError, match=r"manifest\.json: 'a\.parquet' stands there twice; keep one"):
    manifest.read_manifest(str(path))
  inner = json.dumps(BITEXT).replace("{", '{"negatives": 7, ')
  path.write_text(f'{{"a.parquet": {inner}}}')
  with pytest.raises(DataError, match="'negatives' stands there twice"):
    manifest.read_manifest(str(path))


@pytest.mark.parametrize(
  ("path", "expected"),
  [
    (None, "/m/train/a.parquet"),
    ("b/c.parquet", "/m/b/c.parquet"),
    ("/d/c.parquet", "/d/c.parquet"),
    ("hf://datasets/x/y/c.parquet", "hf://datasets/x/y/c.parquet"),
  ],
)
def test_a_file_lies_beside_the_manifest_or_where_its_path_says(path, expected):
  described = BITEXT | ({"path": path} if path else {})
  assert File("train/a.parquet", described, "/m").path == expected
  assert File("a.parquet", BITEXT, "gs://bucket/m").path == "gs://bucket/m/a.parquet"


def test_teacher_vectors_lie_beside_the_manifest_in_the_order_of_the_texts():
  vectors = {"negatives": "n.npy", "passage": "/p.npy", "query": "q.npy"}
  file = File("a.parquet", BITEXT | {"teacher_vectors": vectors}, "/m")
  assert list(file.vectors.items()) == [
    ("query", "/m/q.npy"),
    ("passage", "/p.npy"),
    ("negatives", "/m/n.npy"),
  ]


def test_a_manifest_may_lie_in_the_working_directory_or_at_the_root(write, tmp_path, monkeypatch):
  write()
  monkeypatch.chdir(tmp_path)
  (file,) = manifest.select("manifest.json", ("train/a*",), "--files")
  assert file.path == "./train/a.parquet"
  with fsspec.open("memory:///manifest.json", "w") as opened:
    json.dump({"a.parquet": BITEXT}, opened)
  (file,) = manifest.select("memory:///manifest.json", ("*",), "--files")
  assert file.path == "memory:///a.parquet"


@pytest.mark.parametrize("prefix", ["file://", "local://"])
def test_a_manifest_may_be_a_url_and_its_files_are_beside_it(write, tmp_path, prefix):
  write()
  (tmp_path / "train").mkdir()
  (tmp_path / "train/a.parquet").write_bytes(b"content")
  (file,) = manifest.select(f"{prefix}{tmp_path}/manifest.json", ("train/a*",), "--files")
  with manifest.open_input(file.path) as opened:
    assert opened.read() == b"content"


@pytest.mark.parametrize("folder", ["", "x/", "x/y/"])
def test_a_manifest_may_lie_in_an_archive_with_its_files(tmp_path, folder):
  with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
    archive.writestr(f"{folder}manifest.json", json.dumps({"a.jsonl": BITEXT}))
    archive.writestr(f"{folder}a.jsonl", "content")
  url = f"zip://{folder}manifest.json::file://{tmp_path}/all.zip"
  (file,) = manifest.select(url, ("*",), "--files")
  with manifest.open_input(file.path) as opened:
    assert opened.read() == b"content"


@pytest.mark.parametrize(
  ("task", "own", "expected"),
  [
    ("bitext", None, True),
    ("clustering", None, True),
    ("scored_pairs", None, True),
    ("retrieval", None, False),
    ("classification", None, False),
    ("bitext", False, False),
    ("retrieval", True, True),
  ],
)
def test_documents_are_queries_of_their_kind_by_task_type_or_as_the_manifest_says(
  task, own, expected
):
  described = entry(task, 0, "") | ({} if own is None else {"symmetric": own})
  assert File("a.parquet", manifest.check_entry("m", "a", described), "").symmetric is expected


BAD = [
  ({"postives": 2}, "postives: unknown field; did you mean positives?"),
  ({"symetric": True}, "symetric: unknown field; did you mean symmetric?"),
  ({"teacher_vector": {}}, "teacher_vector: unknown field; did you mean teacher_vectors?"),
  ({"language": "de"}, "language: unknown field; did you mean lang?"),
  ({"task": "bitext"}, "task: unknown field; did you mean task_type?"),
  ({"negative": 4}, "negative: unknown field; did you mean negatives?"),
  ({"Prompt": "Do."}, "Prompt: unknown field; did you mean instruction?"),
  ({"data_files": "a"}, "data_files: unknown field; did you mean path?"),
  ({"colour": "red"}, "colour: unknown field; known are task_type, instruction, query_has_instr"),
  ({"task_type": "sts"}, "task_type: 'sts' is unknown; known: retrieval, bitext"),
  ({"negatives": -1}, "negatives: must not be negative"),
  ({"negatives": "4"}, "negatives: expected int, found '4'"),
  ({"negatives": 4.0}, "negatives: expected int, found 4.0"),
  ({"query_has_instruction": None}, "query_has_instruction: expected bool, found None"),
  ({"instruction": None}, "instruction: expected str, found None"),
  ({"lang": 7}, "lang: expected str, found 7"),
  ({"path": None}, "path: expected str, found None"),
  ({"symmetric": 1}, "symmetric: expected bool, found 1"),
  ({"positives": 0}, "positives: must be at least 1, found 0"),
  ({"positives": True}, "positives: expected int, found True"),
  ({"positives": None}, "positives: expected int, found None"),
  (
    {"task_type": "scored_pairs"},
    "negatives: must be 0 for scored_pairs (query, passage, score), found 4",
  ),
  (
    {"task_type": "scored_pairs", "negatives": 0, "positives": 2},
    "positives: must be 1 for scored_pairs (query, passage, score), found 2",
  ),
  ({"teacher_vectors": "a.npy"}, "teacher_vectors: expected dict, found 'a.npy'"),
  ({"teacher_vectors": {"passage": "p"}}, "teacher_vectors.query: expected the path of an .npy"),
  ({"teacher_vectors": {"query": "q"}}, "teacher_vectors.passage: expected the path of an .npy"),
  (
    {"teacher_vectors": {"query": 1, "passage": "p"}},
    "teacher_vectors.query: expected the path of an .npy file, found 1",
  ),
  (
    {"teacher_vectors": {"query": "q", "passage": "p", "negatives": None}},
    "teacher_vectors.negatives: expected the path of an .npy file, found None",
  ),
  (
    {"teacher_vectors": {"query": "q", "passage": "p", "negative": "n"}},
    "teacher_vectors: 'negative' is unknown; known: query, passage, negatives",
  ),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[next(iter(c)) for c, _ in BAD])
def test_bad_entries_are_refused_by_file_and_field(write, changes, message):
  path = write({"train/a.parquet": BITEXT | changes})
  with pytest.raises(DataError) as error:
    manifest.select(path, ("train/*",), "--files")
  assert f"{path}: train/a.parquet: {message}" in str(error.value)
  assert names(manifest.select(path, ("train/[bc]*",), "--files")) == [NAMES[0], NAMES[2]]


@pytest.mark.parametrize(
  "field", ["task_type", "instruction", "query_has_instruction", "negatives"]
)
def test_a_required_field_must_be_there(write, field):
  path = write({NAMES[1]: {name: value for name, value in BITEXT.items() if name != field}})
  with pytest.raises(DataError, match=rf"train/a\.parquet: {field}: expected \w+, found nothing"):
    manifest.select(path, ("train/*",), "--files")


def test_a_heldout_file_needs_no_fields_of_training(write):
  path = write({NAMES[3]: {"task_type": "bitext", "instruction": "Translate."}})
  (file,) = manifest.select_heldout(path, ("heldout/*",), "--tasks")
  assert not file.instructed
  with pytest.raises(DataError, match=r"heldout/a\.parquet: query_has_instruction: expected bool"):
    manifest.select(path, ("heldout/*",), "--files")
  for absent in ("task_type", "instruction"):
    short = {name: value for name, value in BITEXT.items() if name != absent}
    with pytest.raises(DataError, match=f"{absent}: expected str, found nothing"):
      manifest.select_heldout(write({NAMES[3]: short}), ("heldout/*",), "--tasks")


@pytest.mark.parametrize(
  ("pattern", "hint"),
  [
    ("train/b.parqet", "did you mean 'train/b.parquet'? it lists train/b.parquet, train/a"),
    ("b.parquet", "did you mean 'train/b.parquet'? it lists"),
    ("train/a,train/b", "several are written ('train/a', 'train/b')"),
    ("nothing/*", "it lists " + ", ".join(NAMES[:3]) + ", heldout/a.parquet, n00, n01, n02, n03"),
    ("nothing/*", "n07 and 8 more"),
  ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_of_many(write, pattern, hint):
  path = write({f"n{k:02}": BITEXT for k in range(16)})
  with pytest.raises(DataError) as error:
    manifest.select(path, (pattern,), "data.train")
  assert str(error.value).startswith(f"data.train: {pattern!r} matches no file of {path}; ")
  assert hint in str(error.value) and len(str(error.value)) < 400


def test_notes_of_its_own_may_stand_in_an_entry(write):
  path = write({NAMES[1]: BITEXT | {"licence": "MIT", "rows": 7, "notes": "Of 2024."}})
  assert manifest.select(path, ("train/a*",), "--files")[0].entry["licence"] == "MIT"


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"{", "is not JSON: "),
    (b"\xff\xfe{", "is not JSON: "),
    (b"[]", "must be an object: file -> entry"),
  ],
)
def test_a_manifest_that_is_no_object_is_refused(tmp_path, content, message):
  path = tmp_path / "manifest.json"
  path.write_bytes(content)
  with pytest.raises(DataError, match=rf"manifest\.json {message}"):
    manifest.read_manifest(str(path))


@pytest.mark.parametrize("value", [None, [], "bitext"])
def test_an_entry_that_is_no_object_is_refused(write, value):
  with pytest.raises(DataError, match=r"train/a\.parquet: task_type: expected str, found nothing"):
    manifest.select(write({NAMES[1]: value}), ("train/*",), "--files")


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("/absent/manifest.json", "/absent/manifest.json does not exist"),
    ("/tmp", "/tmp is a folder; name the manifest in it, as /tmp/manifest.json"),
    ("nosuch://x/manifest.json", "nosuch://x/manifest.json: Protocol not known: nosuch"),
  ],
)
def test_a_manifest_that_cannot_be_opened_is_refused_by_path(path, message):
  with pytest.raises(DataError, match=message):
    manifest.read_manifest(path)


def test_a_protocol_whose_package_is_absent_is_refused_with_its_name():
  with pytest.raises(DataError, match=r"gs://b/m\.json: .*[Ii]nstall gcsfs"):
    manifest.read_manifest("gs://b/m.json")
