"""The encoder of an exported folder, against sentence-transformers with the same folder."""

import fnmatch
import json
import shutil

import jax
import numpy as np
import pytest
import sentence_transformers
import torch
from sentence_transformers.util.quantization import quantize_embeddings

from mlembed_jax.data.tokenizer import Tokenizer
from mlembed_jax.errors import LoadError
from mlembed_jax.hf.export import TrainedModel, export_folder
from mlembed_jax.hf.folder import FILES
from mlembed_jax.inference import Encoder
from mlembed_jax.matryoshka import Slice
from mlembed_jax.models import batched
from mlembed_jax.quantize import PRECISIONS, decoded, quantize, ranges, unit
from mlembed_jax.workdir import Run
from tests.material import sentences

TEXTS = [*sentences("en")[:20], *sentences("zh")[:20], "one", "two " * 30]


@pytest.fixture(scope="module")
def encoder(exported):
  return Encoder.load(exported["full"])


@pytest.fixture(scope="module")
def theirs(exported):
  return load_st(exported["full"])


def load_st(folder):
  return sentence_transformers.SentenceTransformer(
    str(folder), device="cpu", model_kwargs={"dtype": torch.float32}
  )


@pytest.mark.parametrize("name", ["full", "cut"])
@pytest.mark.parametrize("prompt", [None, "query"])
def test_vectors_are_those_of_sentence_transformers(exported, name, prompt):
  found = Encoder.load(exported[name]).encode(TEXTS, prompt_name=prompt)
  expected = load_st(exported[name]).encode(TEXTS, prompt_name=prompt)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_prompt_of_ones_own_and_queries_and_documents(encoder, theirs):
  own = encoder.encode(TEXTS, prompt="Find: ")
  np.testing.assert_allclose(own, theirs.encode(TEXTS, prompt="Find: "), atol=1e-5)
  queries = encoder.encode_query(TEXTS)
  np.testing.assert_allclose(queries, theirs.encode_query(TEXTS), atol=1e-5)
  documents = encoder.encode_document(TEXTS)
  np.testing.assert_allclose(documents, theirs.encode_document(TEXTS), atol=1e-5)


def test_one_text_gives_one_vector(encoder):
  alone = encoder.encode(TEXTS[0])
  assert alone.shape == (48,)
  np.testing.assert_allclose(alone, encoder.encode(TEXTS)[0], atol=1e-5)
  assert encoder.encode([]).shape == (0, 48)
  assert np.isfinite(encoder.encode("")).all()


def test_slices_are_those_of_exported_cuts(exported, encoder, tiny, params, data, tmp_path):
  found = encoder.encode(TEXTS, depth=1, dim=16)
  np.testing.assert_allclose(found, Encoder.load(exported["cut"]).encode(TEXTS), atol=1e-5)
  run = Run(tiny, {}, "f" * 64)
  tokenizer = Tokenizer(data / "tokenizer.json", tiny.data.pooled_token)
  trained = TrainedModel(run, 1, params, tokenizer)
  folder = export_folder(tmp_path / "rank", trained, Slice(rank=8), force=True)
  low = encoder.encode(TEXTS, rank=8)
  np.testing.assert_allclose(low, Encoder.load(folder).encode(TEXTS), atol=1e-4)
  assert np.abs(low - encoder.encode(TEXTS)).max() > 1e-3


def test_weights_are_read_once_for_all_ranks_and_depths(exported, monkeypatch):
  model, reads = Encoder.load(exported["full"]), []
  read = Encoder._read
  monkeypatch.setattr(Encoder, "_read", lambda self, of: reads.append(of.rank) or read(self, of))
  for _ in range(2):
    for rank in (8, 16, 24):
      for depth in (1, 3):
        model.encode(TEXTS[:1], rank=rank, depth=depth, untrained=True)
  assert reads == [24]
  layers = [model._cut(None, rank)[1]["layers"] for rank in (8, 24)]
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, *layers))


def test_vectors_can_stay_as_they_are(encoder):
  raw = encoder.encode(TEXTS, normalize=False)
  unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
  np.testing.assert_allclose(unit, encoder.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_are_those_of_sentence_transformers(precision):
  vectors = np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32)
  np.testing.assert_array_equal(
    quantize(vectors, precision), quantize_embeddings(vectors, precision)
  )
  if precision in ("int8", "uint8"):
    fixed = ranges(vectors * 0.5)
    expected = quantize_embeddings(vectors[:50] * 0.4, precision, ranges=fixed)
    np.testing.assert_array_equal(quantize(vectors[:50] * 0.4, precision, fixed), expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_few_vectors_are_rounded_by_given_ranges_alone(precision):
  vectors = np.random.default_rng(0).normal(size=(99, 8)).astype(np.float32)
  with pytest.raises(ValueError, match=r"needs ranges, or at least 100 texts .* found 99"):
    quantize(vectors, precision)
  fixed = ranges(vectors)
  fixed[:, 3] = vectors[0, 3]  # a coordinate that never changed, until now
  for few in (vectors[:1], vectors[:1] * 3, vectors):
    expected = quantize_embeddings(few, precision, ranges=fixed)
    np.testing.assert_array_equal(quantize(few, precision, fixed), expected)
    np.testing.assert_array_equal(quantize(few[0], precision, fixed), expected[0])
  for wrong in (fixed[:, :7], fixed[::-1], fixed * np.nan):
    with pytest.raises(ValueError, match="ranges: "):
      quantize(vectors, precision, wrong)
  assert quantize(vectors[:0], precision).shape == (0, 8)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_decoded_codes_are_the_middles_of_their_levels(precision):
  low, high = fixed = np.array([[-1.0, 0.0, -0.1], [3.0, 0.5, 0.2]], np.float32)
  levels = np.arange(256)[:, None]
  codes = (levels.repeat(3, axis=1) - (128 if precision == "int8" else 0)).astype(precision)
  found = decoded(codes, fixed)
  middles = low + (levels + 0.5) * (high.astype(np.float64) - low) / 255
  np.testing.assert_allclose(found, np.minimum(middles, high), atol=1e-6)
  # The last level is one point, the end of the range.
  np.testing.assert_array_equal(quantize(found[:255], precision, fixed), codes[:255])
  with pytest.raises(ValueError, match="codes: expected int8 or uint8, found float32"):
    decoded(found, fixed)


def test_decoded_codes_find_what_vectors_find_and_codes_do_not():
  """Coordinates have unequal ranges, as those of encoders do."""
  random = np.random.default_rng(0)
  vectors = random.normal(size=(1000, 64)) * random.uniform(0.2, 2, 64) + random.normal(size=64)
  vectors = unit(vectors.astype(np.float32))
  fixed = ranges(vectors)
  codes = quantize(vectors, "int8", fixed)

  def top(x):
    return np.argsort(-(x @ x.T), axis=1)[:, :10]

  def agreement(x):
    pairs = zip(top(vectors), top(x), strict=True)
    return np.mean([len(set(a) & set(b)) / 10 for a, b in pairs])

  by_decoded = agreement(unit(decoded(codes, fixed)))
  by_codes = agreement(unit(codes.astype(np.float32)))
  print(f"top 10 of float32: {by_decoded:.3f} by decoded codes, {by_codes:.3f} by codes")
  assert by_decoded > 0.95 > 0.9 > by_codes


def test_precisions_of_the_encoder(encoder):
  vectors = encoder.encode(TEXTS)
  found = encoder.encode(TEXTS, precision="binary")
  np.testing.assert_array_equal(found, quantize(vectors, "binary"))


@pytest.mark.parametrize(("depth", "dim"), [(None, None), (1, 16), (3, 16)])
def test_int8_of_one_text_is_that_of_many(encoder, depth, dim):
  cut = {"depth": depth, "dim": dim}
  vectors = encoder.encode(TEXTS, **cut)
  expected = quantize_embeddings(vectors, "int8", ranges=encoder.ranges(depth, dim))
  found = np.array([encoder.encode(text, precision="int8", **cut) for text in TEXTS[:4]])
  assert np.abs(found.astype(int) - expected[:4]).max() <= 1  # on the edge of a level
  own = ranges(vectors)
  found = encoder.encode(TEXTS[:4], precision="uint8", ranges=own, **cut)
  expected = quantize_embeddings(vectors[:4], "uint8", ranges=own)
  assert np.abs(found.astype(int) - expected).max() <= 1


def test_stored_ranges_are_those_of_sentence_transformers(exported):
  texts = [text for language in ("en", "de", "zh") for text in sentences(language)]
  for name, depth, dim in (("full", 3, 48), ("full", 3, 16), ("full", 1, 16), ("cut", 1, 16)):
    theirs = sentence_transformers.SentenceTransformer(
      str(exported[name]),
      device="cpu",
      model_kwargs={"dtype": torch.float32},
      config_kwargs={"num_hidden_layers": depth},
    ).encode(texts, truncate_dim=dim, normalize_embeddings=True)
    found = Encoder.load(exported[name]).ranges(depth, dim)
    np.testing.assert_allclose(found, ranges(theirs), atol=1e-5)
  assert Encoder.load(exported["full"]).ranges(2, 16) is None


def test_int8_without_ranges_needs_texts(exported, tmp_path):
  shutil.copytree(exported["cut"], tmp_path / "cut")
  own = json.loads((tmp_path / "cut/mlembed.json").read_text())
  del own["ranges_file"]  # as version 0.1.0 wrote it
  (tmp_path / "cut/mlembed.json").write_text(json.dumps(own))
  encoder = Encoder.load(tmp_path / "cut")
  with pytest.raises(ValueError, match="at least 100 texts to take them from, found 1"):
    encoder.encode("one", precision="int8")
  many = [f"{text} {i}" for i, text in enumerate(TEXTS * 3)]
  expected = quantize_embeddings(encoder.encode(many), "int8")
  np.testing.assert_array_equal(encoder.encode(many, precision="int8"), expected)
  for precision in PRECISIONS:
    assert len(encoder.encode([], precision=precision)) == 0


def test_vectors_of_other_scales_are_not_rounded_by_the_folders_ranges(encoder):
  with pytest.raises(ValueError, match="needs ranges"):
    encoder.encode("one", precision="int8", normalize=False)
  with pytest.raises(ValueError, match="ranges: vectors in binary have none"):
    encoder.encode("one", precision="binary", ranges=np.zeros((2, 48)))


def test_damaged_ranges_are_refused(exported, tmp_path):
  shutil.copytree(exported["cut"], tmp_path / "cut")
  file = tmp_path / "cut" / "mlembed" / "ranges.safetensors"
  whole = file.read_bytes()
  for content in (whole[:-1], whole.replace(b"l1-d16", b"l1 d16"), None):
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(LoadError, match=r"E104 file: .*ranges\.safetensors"):
      Encoder.load(tmp_path / "cut").encode("one", precision="int8")


def test_vectors_handed_out_are_contiguous_and_their_own(encoder):
  for options in (
    {"normalize": False, "dim": 16},
    {"dim": 16},
    {"precision": "binary"},
    {"precision": "int8"},
  ):
    for texts in (TEXTS, TEXTS[0], []):
      found = encoder.encode(texts, **options)
      assert found.flags.c_contiguous and found.base is None


def test_long_texts_are_cut_and_counted(exported):
  encoder = Encoder.load(exported["full"])
  long = "house river " * 50_000
  with pytest.warns(UserWarning, match="2 of 3 texts are cut to 128 tokens"):
    found = encoder.encode([long, "one", long + "sun"])
  np.testing.assert_array_equal(found[0], found[2])
  expected = load_st(exported["full"]).encode([long])
  np.testing.assert_allclose(found[:1], expected, atol=1e-5)
  assert encoder.truncated == 2


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"prompt_name": "nope"}, "prompt_name: 'nope' is no prompt of .*there are: query, document"),
    ({"depth": 2}, "depth: 2 was not trained; the nearest are 1, 3; untrained=True"),
    ({"depth": 4}, "depth: 4, but the model has 1 to 3"),
    ({"dim": 20}, "dim: 20 was not trained; the nearest are 16, 48"),
    ({"rank": 100}, "rank: 100, but the model has 1 to 24"),
    ({"precision": "int4"}, "precision: 'int4' is not one of float32, int8"),
  ],
)
def test_what_cannot_be_meant_is_refused(encoder, options, message):
  with pytest.raises(ValueError, match=message):
    encoder.encode(TEXTS, **options)


@pytest.mark.parametrize("depth", ["1", True, 1.0])
def test_a_size_is_a_whole_number(encoder, depth):
  with pytest.raises(ValueError, match=f"depth: {depth!r} is no whole number"):
    encoder.encode("one", depth=depth)


def test_vectors_of_different_dimensions_have_no_similarity(encoder):
  one, other = encoder.encode("one", dim=16), encoder.encode(["two"])
  with pytest.raises(ValueError, match="vectors of 16 and of 48 dimensions; encode both with"):
    encoder.similarity(one, other)


def test_the_dimensions_that_a_folder_of_others_states_can_be_used(exported, tmp_path):
  folder = shutil.copytree(exported["full"], tmp_path / "copy")
  (folder / "mlembed.json").unlink()
  theirs = Encoder.load(folder)
  assert theirs.sizes.dims == (16, 48) and theirs.sizes.depths == (3,)
  expected = Encoder.load(exported["full"]).encode("one", dim=16)
  np.testing.assert_array_equal(theirs.encode("one", dim=16), expected)
  config = json.loads((folder / "config.json").read_text())
  for stated in ([64, 0, "16"], None, 16):
    (folder / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": stated}))
    assert Encoder.load(folder).sizes.dims == (48,)


def test_untrained_sizes_are_allowed_by_a_flag(encoder):
  assert encoder.encode(TEXTS, depth=2, dim=20, untrained=True).shape == (len(TEXTS), 20)


def test_ranks_need_factors(exported, tmp_path):
  shutil.copytree(exported["full"], tmp_path / "copy")
  ours = json.loads((tmp_path / "copy" / "mlembed.json").read_text())
  ours["table"]["uv_file"] = None
  (tmp_path / "copy" / "mlembed.json").write_text(json.dumps(ours))
  with pytest.raises(ValueError, match="rank: 8, but the model has a full token table"):
    Encoder.load(tmp_path / "copy").encode(TEXTS, rank=8)


def test_vectors_that_are_not_finite_are_named(encoder, monkeypatch):
  model, params = encoder._cut(None, None)
  broken = params | {"final_norm": {"scale": params["final_norm"]["scale"].at[0].set(np.nan)}}
  monkeypatch.setattr(encoder, "_cut", lambda *_: (model, broken))
  with pytest.raises(ValueError, match=r"texts\[0\] and 41 more have vectors that are not finite"):
    encoder.encode(TEXTS)


def test_a_folder_that_does_not_say_what_ends_a_text_is_refused(exported, tmp_path):
  shutil.copytree(exported["full"], tmp_path / "plain")
  (tmp_path / "plain" / "mlembed.json").unlink()
  spec = json.loads((tmp_path / "plain" / "tokenizer.json").read_text())
  found = Encoder.load(tmp_path / "plain").encode(TEXTS)  # its post-processor says it
  (tmp_path / "plain" / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None}))
  with pytest.raises(LoadError, match="say with pooled_token which one ends it"):
    Encoder.load(tmp_path / "plain")
  again = Encoder.load(tmp_path / "plain", pooled_token="<|endoftext|>")
  np.testing.assert_array_equal(again.encode(TEXTS), found)


def test_all_that_an_encoder_reads_is_downloaded(exported):
  for file in exported["full"].glob("*.json"):
    downloaded = any(fnmatch.fnmatch(file.name, pattern) for pattern in FILES)
    assert downloaded == (file.name != "parity.json"), file.name


def test_few_programs_serve_all_lengths(encoder):
  ids = [[5] * n for n in np.random.default_rng(0).integers(1, 100, 500).tolist()]
  encoder.states(ids, (3,))
  compiled = batched._program.cache_info()
  assert encoder.states(ids[::-1], (3,)).shape == (1, 500, 48)
  assert batched._program.cache_info().misses == compiled.misses
