"""Tables, plots and sentences of measured results are right, also where a baseline wins."""

import json
import math

import main_job_cpu
import pytest
import study_numbers
import study_plots
import study_report
from scripts import script

tables = script("bench/tables.py")


def result_of(gains: dict[str, list[float]]) -> dict:
    about = {"device": "a chip", "cores": 2, "torch": "2.15", "budget_seconds": 12.0, "steps": 80, "eval_prompts": 128}
    about |= {"base": {"nano_preference": 0.8, "nano_verifier": 0.6}, "wall_seconds": 1230.0}
    rows = []
    for arm, values in gains.items():
        for seed, gain in enumerate(values):
            row = {"base": 0.5, "tuned": 0.5 + gain, "diff": gain}
            names = dict.fromkeys(("trained", "verifier", "clip", "motion", "diversity"), row)
            spent = {"steps": 80, "device_seconds": 30.0, "queries": 2000}
            rows.append({"arm": arm, "seed": seed, "settings": {"learning_rate": 1e-3}} | names | spent)
    return {"environment": about, "rows": rows}


RESULT = result_of(
    {"DRaFT-K": [0.1, 0.2, 0.3], "DDPO": [0.3, 0.4, 0.51], "SRPO": [0.0, 0.05, 0.1], "ReFL": [0.3, 0.1, 0.2]}
)


def test_intervals_are_students_over_seeds():
    mean, half = study_numbers.mean_interval([0.1, 0.2, 0.3])
    assert (mean, half) == (pytest.approx(0.2), pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4))
    assert math.isnan(study_numbers.mean_interval([0.1])[1])


def test_differences_to_the_default_are_of_the_same_seeds():
    arms = study_numbers.by_arm(RESULT)
    one_more = arms["SRPO"] + [arms["SRPO"][0] | {"seed": 7}]
    expected = study_numbers.mean_interval([-10.0, -15.0, -20.0])
    assert study_numbers.against_default(arms | {"SRPO": one_more}, "SRPO", "verifier") == pytest.approx(expected)
    assert study_numbers.against_default(arms | {"SRPO": one_more[-1:]}, "SRPO", "verifier") is None


def test_what_is_found_is_told_also_where_a_baseline_wins():
    told = study_report.findings(RESULT)
    assert "Highest verifier, points: DDPO, +40.3" in told
    assert "higher: DDPO; lower: SRPO; no significant difference: ReFL" in told
    table = study_report.gains_table(RESULT)
    assert table.splitlines()[2].startswith("| DDPO | 3 | 80 | +0.403 ± 0.261 | +40.3 ± 26.1 | ")
    assert "| **DRaFT-K** | 3 | 80 | +0.200 ± 0.248 | +20.0 ± 24.8 | +0.200 ± 0.248 | +40.0 ± 49.7 |" in table
    assert "| DDPO | 2,000 | +0.202 ± 0.130 | +20.2 ± 13.0 | +40.3 ± 26.1 | +40.3 ± 26.1 |" in (
        study_report.queries_table(RESULT)
    )
    failed = RESULT["rows"] + [{"arm": "ReFL", "seed": 3, "error": "ValueError: nan"}]
    told = study_report.conditions(RESULT | {"rows": failed})
    assert (
        "Seeds of every arm: 0, 1, 2. All runs took 20 minutes. Runs that failed: ReFL, seed 3 (ValueError: nan)."
        in told
    )


def long_result() -> dict:
    """Return a long study with best-of-n: DRaFT-K turns, ReFL does not, SRPO has no curve."""
    result = result_of({"best-of-n": [0.15, 0.15], "DRaFT-K": [0.1, 0.1], "ReFL": [0.3, 0.3], "SRPO": [0.0]})
    ways = {"DRaFT-K": [(0.6, 0.7), (0.7, 0.6)], "ReFL": [(0.6, 0.6), (0.8, 0.8)]}  # trained reward and verifier
    for row in result["rows"]:
        row["settings"] |= {"n": 9} if row["arm"] == "best-of-n" else {}
        if way := ways.get(row["arm"]):
            row["curve"] = [
                {"steps": 40 * i, "device_seconds": 15.0 * i, "trained": trained}
                | dict.fromkeys(("verifier", "clip", "diversity"), verifier)
                for i, (trained, verifier) in enumerate(way, 1)
            ]
    return result


def test_a_long_study_tells_where_arms_turn_and_when_they_equal_best_of_n():
    result = long_result()
    turns = study_report.turns_table(result)
    assert "| **DRaFT-K** | 2 | 40 of 80 | +20.0 | +10.0 | +0.200 |" in turns
    assert "| ReFL | 2 | no | - | +30.0 | +0.300 |" in turns
    assert "SRPO" not in turns
    equals = study_report.equals_table(result).splitlines()
    assert equals[0] == "| arm | seeds | best-of-n, n = 9 (+15.0) |"
    assert "| **DRaFT-K** | 2 | 11 |" in equals  # three quarters of the way to +20 points
    assert "| ReFL | 2 | 19 |" in equals
    assert "| **DRaFT-K** | 2 | 40 (turns) | 15 | +0.100 | +20.0 | +0.200 | +40.0 |" in study_report.curves_table(
        result
    )
    assert study_report.seeds_of(result) == "Seeds of the arms: 0, 1; but 0 of SRPO."
    del result["rows"][4]["curve"][0]  # of ReFL: what was judged after other steps is left out
    assert "| ReFL | 1 | no | - | +30.0 | +0.300 |" in study_report.turns_table(result)
    del result["rows"][5]["curve"]
    assert "| ReFL | 1 | no | - | +30.0 | +0.300 |" in study_report.turns_table(result)


def test_tables_of_a_study_without_curves_or_rows_are_fine():
    short = [study_report.TABLES[f"study_long.json#{part}"](RESULT) for part in ("turns", "equals", "curves")]
    assert short == [""] * 3
    empty = RESULT | {"rows": []}
    assert all(isinstance(of(empty), str) for name, of in study_report.TABLES.items() if name.startswith("study_long"))


def test_plots_are_drawn(tmp_path):
    for draw in (study_plots.plot_gains, study_plots.plot_costs, study_plots.plot_frontier):
        draw(long_result(), tmp_path / "plot.png")
        assert 5_000 < (tmp_path / "plot.png").stat().st_size < 200_000


def test_tables_replace_what_stands_in_their_places(tmp_path):
    """A whole file, a part of one, single results; nothing where nothing was measured."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    text = "before\n<!-- table: bench/results/methods.json -->\nold\n<!-- end of table -->\n"
    text += "<!-- table: bench/results/study.json#conditions -->\n<!-- end of table -->\n"
    text += "<!-- study: DRaFT-K --><!-- / -->"
    assert tables.fill(text, tmp_path) == text.replace("old\n", "")
    for values in ([0.1, 0.3], [0.5]):
        result = result_of({"DRaFT-K": values})
        result["environment"]["arms"] = ["DRaFT-K"]
        result["rows"] = [row | {"hacking_gap": 0.25} for row in result["rows"]]
        for name in ("methods", "study"):
            (tmp_path / "bench" / "results" / f"{name}.json").write_text(json.dumps(result))
        text = tables.fill_cells(tables.fill(text, tmp_path), tmp_path)
    assert text.startswith("before\n<!-- table")
    assert text.endswith("<!-- study: DRaFT-K -->+0.500, +50.0, +100 %<!-- / -->")
    assert text.count("Measured on a chip (2 cores), torch 2.15.") == 2
    assert text.count("Budget of each arm: 12.0 device-seconds") == 1
    assert "| `DRaFT-K` | 1 | +0.500 | +50.0 | +0.500 | +0.250 | +100.0 | 0.375 |" in text


def test_the_sweeps_table_shows_every_variant():
    rows = [row | {"variant": {"learning_rate": rate}} for rate in (1, 2) for row in RESULT["rows"]]
    rows += [{"arm": "DDPO", "variant": {"learning_rate": 3}, "seed": 0, "error": "ValueError"}]
    table = study_report.sweep_table({"rows": rows})
    assert "| DDPO | learning_rate 1 | 3 | +0.403 | +40.3 |" in table
    assert "| DDPO | learning_rate 3 | 1 | failed | failed |" in table


def test_rows_of_the_main_job_are_those_of_todays_recipe():
    gain = {"base": 0.25, "tuned": 0.5, "diff": 0.25, "ci95": [0.125, 0.375]}
    about = {"device": "a chip", "flags": [], "beside_others": True, "motion": gain, "diversity": gain}
    about |= {"trained": {"nano_preference": gain}, "held_out": {"verifier": gain, "clip": gain}}
    rows = [{"seed": 3, "recipe": main_job_cpu.recipe()}, {"seed": 4, "recipe": {}}, {"seed": 5}]
    rows[0] |= {"diversity_videos": 4, main_job_cpu.SEVERAL: gain | {"tuned": 0.75}}
    rows.append(rows[0] | {"seed": 6, "flags": ["--eval_seed", "9"]})
    del rows[-1][main_job_cpu.SEVERAL]
    *_, first, second = main_job_cpu.main_job_cpu_table({"rows": [about | row for row in rows]}).strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (first, second)]
    assert [row[:2] for row in cells] == [["3", "0"], ["6", "9"]]
    assert cells[0][4] == "25.0% → **50.0%**, +0.250 [+0.125, +0.375]"
    assert [row[5] for row in cells] == ["25.0% → **75.0%**, +0.250 [+0.125, +0.375]", "-"]
    assert cells[0][-2:] == ["+100.0%", "-"], "diversity; seconds beside other programs are not told"
