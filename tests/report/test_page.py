"""The page: self-contained, complete, and without side effects."""

import json
import re
from html.parser import HTMLParser

import matplotlib as mpl
import pytest
from synthetic import make_result

from equimd.analysis.accuracy import Errors
from equimd.analysis.equivariance_results import StressSpread
from equimd.errors import InputError
from equimd.report import load_results, write_report
from equimd.report.figures import pareto_front
from equimd.report.page import _methods, render
from equimd.report.table import rich_table, rows
from equimd.report.verdict import in_words

VOID = {"meta", "br", "link", "img", "hr", "input"}


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture(scope="module")
def page(result):
    return render(result)


class Nesting(HTMLParser):
    """Collects attributes, and checks that every tag is closed by its own end."""

    def __init__(self):
        super().__init__()
        self.open, self.attributes = [], []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_well_formed_and_nothing_is_fetched(page):
    parser = Nesting()
    parser.feed(page)
    assert parser.open == []
    links = [value for name, value in parser.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert links  # parity points are an embedded picture
    assert all(value.startswith(("#", "data:")) for value in links)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "<script" not in page


def test_every_figure_and_fact_is_there(page, result):
    assert page.count("<svg") == 6
    for text in ("Equivariance error along the trajectory", "Share of the loss", "Error by element", "Force parity"):
        assert text in page
    for p in result.potentials:
        assert page.count(p.name) > 3
    assert result.provenance.processor in page
    assert f"torch {result.provenance.versions['torch']}" in page
    assert "GFN2-xTB" in page


def test_a_phone_can_tell_whose_every_number_is(page, result):
    """Below 760 px a row is a heading and its numbers, each with the badge and colour of its potential."""
    n_rows, n = len(rows(result)), len(result.potentials)
    cells = re.findall(r'<td class="value" style="--whose:(#\w+)">', page)
    assert cells == re.findall(r'<th scope="col" style="--whose:(#\w+)">', page) * n_rows
    assert len(set(cells)) == n
    narrow = page[page.index("@media screen and (max-width: 760px)") : page.index("@media print")]
    for name in set(re.findall(r"\.([a-z]+)", narrow)):
        assert re.search(rf'class="[^"]*\b{name}\b', page) or name == "svg", name


def test_long_names_leave_the_figures_their_room():
    """Warnings are errors here: matplotlib warns when a legend leaves no room for the axes."""
    names = ("alanine-dipeptide-equivariant", "alanine-dipeptide-transformer", "long" * 20)
    page = render(make_result(names=names, symmetry=(1e-7, 1e-3, 1e-2)))
    assert page.count("<svg") == 6


def test_how_floors_were_found_is_said(page, result):
    assert "difference between forces in float32 and in float64" in page
    assert "sixth differences" not in page
    first = result.potentials[0]
    force = first.equivariance.force.model_copy(update={"floor_kind": "estimated"})
    other = first.model_copy(update={"equivariance": first.equivariance.model_copy(update={"force": force})})
    assert "sixth differences" in _methods(result.model_copy(update={"potentials": [other]}))
    table = {row.label.strip(): row for row in rows(result.model_copy(update={"potentials": [other]}))}
    assert table["rounding floor"].values == ["1.9·10⁻⁴ (estimated)"]


def test_names_are_escaped():
    page = render(make_result(names=("<b>a", "b&c")))
    assert "<b>a" not in page
    assert "&lt;b&gt;a" in page


def test_drawing_leaves_matplotlib_as_it_was(result):
    before = dict(mpl.rcParams)
    render(result)
    assert dict(mpl.rcParams) == before


def test_the_same_results_make_the_same_page(page, result):
    assert render(result) == page


@pytest.mark.parametrize("symmetry", [(0.0, 0.0), (1e-9, 0.5)])
def test_extreme_errors_are_drawn(symmetry):
    assert render(make_result(symmetry=symmetry)).count("<svg") == 6


def test_one_and_three_potentials_are_drawn():
    for names, symmetry in ((("a",), (1e-3,)), (("a", "b", "c"), (1e-7, 1e-3, 1e-2))):
        assert render(make_result(names=names, symmetry=symmetry)).count("<svg") == 6


def test_results_survive_the_file(result, tmp_path):
    result.write(tmp_path / "results.json")
    again = load_results(tmp_path)
    assert again.to_json() == result.to_json()
    path = write_report(again, tmp_path)
    assert path == tmp_path / "report.html"
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "report.html"}


def test_results_of_an_earlier_version_are_drawn(result, page, tmp_path):
    stored = json.loads(result.to_json())
    for p in stored["potentials"]:
        for new in ("stopped", "stability", "n_failed", "missing"):
            del p[new]
    (tmp_path / "results.json").write_text(json.dumps(stored))
    assert render(load_results(tmp_path)) == page


PARTS = ("accuracy", "accuracy_own", "equivariance", "nve", "throughput", "verdict")


def lacking(result, parts, everywhere):
    first, second = result.potentials
    without = {part: None for part in parts}
    potentials = [first.model_copy(update=without if everywhere else {}), second.model_copy(update=without)]
    return result.model_copy(update={"potentials": potentials, "verdict": in_words(potentials)})


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_could_not_be_measured_is_a_dash(result, part, everywhere):
    shown = lacking(result, [part], everywhere)
    before, after = ({row.label: row.values for row in rows(one)} for one in (result, shown))
    changed = [label for label in before if before[label] != after.get(label)]
    assert bool(changed) == (part != "accuracy_own")  # which the table does not show
    assert all(label not in after if everywhere else after[label][1] == "–" for label in changed)
    assert shown.verdict
    assert not any("None" in line for line in shown.verdict)


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_page_is_drawn_of_what_there_is(result, everywhere):
    page = render(lacking(result, PARTS, everywhere))
    assert page.count("<svg") == (4 if everywhere else 6)  # series and parity alone
    text = re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)
    assert not re.search(r"\bnan\b|\bNone\b", text)
    assert "not known</p>" in text


@pytest.mark.parametrize("text", ["", "{", '{"schema_version": 1}', "[]"])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(InputError, match="no comparison"):
        load_results(tmp_path)
    with pytest.raises(InputError, match="cannot read"):
        load_results(tmp_path / "nowhere")


def test_table_carries_units_and_error_bars(result):
    table = {row.label.strip(): row for row in rows(result)}
    assert table["Force error (MAE)"].values == ["4.50", "16.5"]
    assert table["Force error (MAE)"].unit == "meV/Å"
    assert "±" in table["Equivariance error"].values[1]
    assert table["Symmetry error is"].values == ["exact", "visible"]
    whole = 1e3 * result.potentials[1].equivariance.force.rmse_equiv
    for label, share in (("rotations alone", 0.96), ("from inversion", 0.28)):
        assert float(table[label].values[1].split(" ± ")[0]) == pytest.approx(share * whole, rel=0.01)  # three digits
    assert "Stress error (MAE)" not in table  # nobody has it
    assert "stress spread" not in table
    assert rich_table(result).row_count == len(table)


def test_stress_is_in_both_units(result):
    stress = StressSpread(rmse_equiv=6.2415e-3, antisymmetric=6.2415e-5)
    errors = Errors(mae=6.2415e-3, rmse=0.01)
    first = result.potentials[0]
    update = {
        "equivariance": first.equivariance.model_copy(update={"stress": stress}),
        "accuracy": first.accuracy.model_copy(update={"stress": errors}),
    }
    changed = result.model_copy(update={"potentials": [first.model_copy(update=update), result.potentials[1]]})
    table = {row.label.strip(): row for row in rows(changed)}
    for label, shown in (
        ("Stress error (MAE)", "6.24 (1.00)"),
        ("stress spread", "6.24 (1.00)"),
        ("stress asymmetry", "0.0624 (0.0100)"),
    ):
        assert table[label].values == [shown, "–"]
        assert table[label].unit == "meV/Å³ (GPa)"


def test_results_of_0_1_0_are_read(result, tmp_path):
    """Results without the parts, floors of energy and stress, groups and levels that came later."""
    new = {
        "equivariance.force": ("proper", "proper_stderr", "inversion", "inversion_stderr", "floor_kind"),
        "equivariance.energy": (
            "stderr",
            "proper",
            "proper_stderr",
            "inversion",
            "inversion_stderr",
            "floor",
            "at_floor",
        ),
        "equivariance.loss": ("suspicious",),
        "equivariance.per_frame": (
            "inversion_squared",
            "energy_inversion_squared",
            "stress_variance",
            "stress_inversion_squared",
        ),
        "accuracy": ("stress_gpa", "group_key", "by_group", "suspicious"),
        "accuracy_own": ("stress_gpa", "group_key", "by_group", "suspicious"),
    }
    data = json.loads(result.to_json())
    for potential in data["potentials"]:
        for path, fields in new.items():
            block = potential
            for name in path.split("."):
                block = block[name]
            for field in fields:
                del block[field]
    (tmp_path / "results.json").write_text(json.dumps(data))
    labels = [row.label.strip() for row in rows(load_results(tmp_path))]
    assert "rotations alone" not in labels
    assert "Equivariance error" in labels


def test_pareto_front():
    points = [(1.0, 5.0), (2.0, 6.0), (3.0, 4.0), (2.5, 3.0), (3.0, 9.0)]
    # (1, 5) and (2, 6) are beaten by (2.5, 3); (3, 9) by (3, 4).
    assert pareto_front(points) == [(2.5, 3.0), (3.0, 4.0)]
    assert pareto_front([]) == []
