"""Figures in the documents are those of eval/results."""

from pathlib import Path

from eval.compare_table import markdown_table, read_results
from scripts.results_table import clutter_table, precision_table, question_table, read_rows, zero_shot_table

ROOT = Path(__file__).parents[1]


def test_tables_of_the_card_are_the_measured_ones():
    card = (ROOT / "sf_mllm/demo_model/README.md").read_text(encoding="utf-8")
    assert question_table() in card
    assert zero_shot_table() in card


def test_tables_of_the_readme_are_the_measured_ones():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert precision_table() in readme
    assert clutter_table() in readme
    *_, mean = (row for row in read_rows("scene_qa") if row["model"] == "demo:sf_llava" and row["type"] == "mean")
    assert f"it answers {100 * float(mean['accuracy']):.1f} % of" in readme


def test_the_table_of_the_comparison_is_the_measured_one():
    assert markdown_table(*read_results([ROOT / "eval/results"])) in (ROOT / "eval/README.md").read_text(
        encoding="utf-8"
    )


def test_every_row_says_where_when_and_how():
    files = sorted((ROOT / "eval/results").glob("*.csv"))
    assert files
    for path in files:
        for row in read_rows(path.stem):
            assert all(row[column] for column in ("device", "torch", "date", "command")), path
