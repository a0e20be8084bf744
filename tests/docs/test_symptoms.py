"""bench/results/symptoms.md quotes what its commands print."""

import re
from pathlib import Path

import pytest
from scripts import script

from rewards import RewardError, load_reward, probe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "bench" / "results" / "symptoms.md").read_text()
EXPECTED = {  # symptom: what its command says, as regular expressions
    "memory": [r"can't allocate memory"],
    "memory_cured": [r"^ +1 +0\.66"],
    "cheated": [r"^ +8 .* 2\d\.\d", r"preference \(held-out\) +0\.71\d+ +0\.0"],
    "guarded": [r"did not rise in 2 evaluations; the best was step 0", r"^4 steps"],
    "flat": [r"got a gradient of exactly zero; expected a non-zero gradient"],
    "capped": [r"^ +2 +0\.3 +\S+ +0 "],
    "infinite": [r"norm nan, expected a finite number; it comes from the reward unburnt", r"step-0; go on with"],
    "one_by_one": [r"^ +3 +0\.70"],
    "together": [r"^ +3 +0\.70"],
}


@pytest.fixture(scope="module")
def symptoms():
    return script("bench/symptoms.py")


def test_every_command_of_the_page_shows_its_symptom(symptoms):
    assert set(symptoms.commands(PAGE)) == set(EXPECTED)
    for name, patterns in EXPECTED.items():
        (quoted,) = re.findall(rf"<!-- said: {name} -->\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)
        for pattern in patterns:
            assert re.search(pattern, quoted, re.MULTILINE), (name, pattern)


def test_the_flat_reward_is_refused_and_the_others_pass_the_probe(monkeypatch):
    monkeypatch.chdir(ROOT)
    broken = "docs/examples/broken.py"
    with pytest.raises(RewardError, match="a gradient of exactly zero"):
        probe(load_reward(f"{broken}:rounded"))
    for name in ("grain", "unburnt"):
        assert min(probe(load_reward(f"{broken}:{name}")).grad_norms) > 0


def test_what_is_said_is_put_in_its_place_and_again(symptoms):
    text = "<!-- said: a -->\n<!-- end -->\nx\n<!-- said: b -->\nold\n<!-- end -->"
    for said in ("first", r"second \1"):
        text = symptoms.fill(text, "a", said)
    assert (
        text == "<!-- said: a -->\n\n```text\nsecond \\1\n```\n\n<!-- end -->\nx\n<!-- said: b -->\nold\n<!-- end -->"
    )


def test_only_what_the_program_says_is_quoted(symptoms):
    lines = ["train:   0%|   | 0/1", "Traceback (most recent call last):", '  File "x.py", line 1', "    f(x)", ""]
    assert not [line for line in lines if symptoms.is_said(line)]
    assert all(symptoms.is_said(line) for line in ("ValueError: no", "  accelerate launch", "       base   tuned"))
    table = symptoms.metrics_table([{"step": 1, "reward": 0.25, "other": 3}, {"step": 2}])
    assert table == "step  reward\n   1    0.25\n   2        "
    assert symptoms.metrics_table([]) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_a_command_says_it_again(name, symptoms, tmp_path):
    said = symptoms.said_by(symptoms.commands(PAGE)[name], tmp_path)
    for pattern in EXPECTED[name]:
        assert re.search(pattern, said, re.MULTILINE), said
