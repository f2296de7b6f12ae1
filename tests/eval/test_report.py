"""The page holds the numbers, loads nothing, and no text of the data can become markup."""

import html.parser
import json
import math
import re
from dataclasses import replace

import pytest

from mlembed_jax.eval import report, summary
from mlembed_jax.slice_scores import Size
from tests.eval import made_up

HOSTILE = '</script><img src=x onerror="alert(1)">&amp;{{data}}<!--'
VOID = {"meta", "input", "br"}
OPTIONAL = {"tr", "td", "th", "tbody", "thead"}  # of which the end tags may be left out


class Reader(html.parser.HTMLParser):
  """Collects elements, attributes and the text of each script."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.open, self.scripts, self.text = [], [], {}, []
    self.feed(text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID | OPTIONAL:
      self.open.append(tag)

  def handle_endtag(self, tag):
    if tag not in OPTIONAL:
      assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == "script":
      kind = self.elements[-1][1].get("type", "script")
      self.scripts[kind] = self.scripts.get(kind, "") + data
    else:
      self.text.append(data)

  @property
  def data(self):
    return json.loads(self.scripts["application/json"])


def size_of(value):
  """Returns the slice that an entry of the page is about."""
  return Size(*(value[axis] for axis in Size._fields))


def shown(page, name):
  """Returns whether the section of a heading is there to be seen."""
  section = next(a for tag, a in page.elements if a.get("aria-labelledby") == name)
  return "hidden" not in section


@pytest.fixture(scope="module")
def evaluation():
  return made_up.evaluation(depths=(4, 12, 28), dims=(8, 64, 1024), ranks=(64, 512))


@pytest.fixture(scope="module")
def page(evaluation, tmp_path_factory):
  path = tmp_path_factory.mktemp("report") / "report.html"
  report.write_page(path, evaluation)
  return Reader(path.read_text(encoding="utf-8"))


def test_every_element_is_closed_and_every_part_is_filled(page, evaluation):
  assert page.open == []
  assert not re.search(r"\{\{\w+\}\}", report.page(evaluation))


def test_nothing_is_loaded(evaluation, page):
  assert "://" not in report.page(evaluation)
  assert not [a for _, a in page.elements if {"src", "href", "srcset", "action"} & set(a)]
  assert "default-src 'none'" in next(
    a["content"] for _, a in page.elements if "content" in a and "http-equiv" in a
  )


def test_the_numbers_parse_back(page, evaluation):
  data = page.data
  assert len(data["slices"]) == 3 * 3 * 2 * 3
  assert [view["name"] for view in data["views"]] == [
    "mean of 4 tasks",
    *(task.name for task in evaluation.tasks),
  ]
  slices = {size_of(value): value for value in data["slices"]}
  codes = [code for code, _ in data["views"][2]["languages"]]
  for score in evaluation.scores:
    value = slices[score.size]
    view = 1 + [task.name for task in evaluation.tasks].index(score.task)
    assert value["scores"][view] == pytest.approx(score.score, abs=1e-6)
    by_language = dict(zip(codes, value["languages"][view], strict=True))
    assert by_language == pytest.approx(score.by_language, abs=1e-6)


def test_the_fronts_are_those_of_the_summary(page, evaluation):
  data = page.data
  for view, task in enumerate([None, *(task.name for task in evaluation.tasks)]):
    points = summary.points(evaluation, task)
    for cost, places in data["views"][view]["fronts"].items():
      sizes = [size_of(data["slices"][place]) for place in places]
      assert sizes == [point.size for point in summary.front(points, cost)]


def test_the_answer_stands_in_the_page_itself(page, evaluation):
  text = " ".join(page.text)
  points = summary.points(evaluation)
  for share in summary.SHARES:
    for point in summary.cheapest(evaluation, share).values():
      assert summary.name(point, points) in text
  assert all(shown(page, name) for name in ("h-answer", "h-sizes", "h-costs", "h-languages"))


def test_data_cannot_become_markup(evaluation):
  hostile = replace(
    evaluation,
    model=HOSTILE,
    costs=replace(evaluation.costs, device=HOSTILE),
    skipped={HOSTILE: 3},
    tasks=[
      replace(task, name=HOSTILE + task.name, type=HOSTILE, metric=HOSTILE)
      for task in evaluation.tasks
    ],
    scores=[
      replace(
        score,
        task=HOSTILE + score.task,
        by_language={HOSTILE: 0.5, **score.by_language},
        others={HOSTILE: 0.5},
      )
      for score in evaluation.scores
    ],
  )
  page = Reader(report.page(hostile))
  assert page.open == []
  assert "img" not in {tag for tag, _ in page.elements}
  assert page.data["views"][0]["languages"][0][0] == HOSTILE
  assert page.data["views"][1]["name"].startswith(HOSTILE)
  assert sum(HOSTILE in text for text in page.text) >= 6


def test_one_slice_has_tables_and_no_charts():
  one = made_up.evaluation((28,), (1024,), (0,), ("float32",))
  page = Reader(report.page(one))
  assert not shown(page, "h-sizes") and not shown(page, "h-costs") and not shown(page, "h-pairs")
  assert shown(page, "h-languages") and shown(page, "h-tasks")
  assert not [a for _, a in page.elements if "data-cost" in a]
  assert "full token table" in " ".join(page.text)


def test_only_precisions_differ():
  page = Reader(report.page(made_up.evaluation((28,), (1024,), (0,))))
  assert not shown(page, "h-sizes") and shown(page, "h-costs")
  assert [a["data-cost"] for _, a in page.elements if "data-cost" in a] == ["bytes"]
  assert page.data["chosen"] != page.data["full"]


def test_what_was_not_measured_is_left_out(evaluation):
  scores = [*evaluation.scores]
  scores[0] = replace(scores[0], score=math.nan)
  scores[5] = replace(scores[5], by_language=scores[5].by_language | {"de": math.nan})
  costs = replace(evaluation.costs, latency_ms=[])
  lacking = replace(evaluation, scores=scores, costs=costs, skipped={})
  page = Reader(report.page(lacking))
  assert "latency" not in [a.get("data-cost") for _, a in page.elements]
  assert "Latency" not in " ".join(page.text)
  spoilt = next(value for value in page.data["slices"] if size_of(value) == scores[0].size)
  assert spoilt["scores"][:2] == [None, None]


def test_a_task_whose_number_of_texts_is_not_known(evaluation):
  unknown = [replace(task, texts=None) for task in evaluation.tasks]
  some = replace(evaluation, tasks=[*unknown[:1], *evaluation.tasks[1:]])
  known = sum(task.texts for task in some.tasks[1:])
  assert f"4 tasks, {known:,} texts" in report.page(some)
  text = report.page(replace(evaluation, tasks=unknown))
  assert "4 tasks, " in text and " texts" not in text.split("</header>")[0]


def test_a_language_that_only_some_tasks_have(evaluation):
  scores = [
    score
    if score.task == "udhr_bitext.parquet"
    else replace(score, by_language={k: v for k, v in score.by_language.items() if k != "de"})
    for score in evaluation.scores
  ]
  view = Reader(report.page(replace(evaluation, scores=scores))).data["views"][0]
  assert dict(view["languages"])["de"] == 1 and dict(view["languages"])["fr"] == 4
