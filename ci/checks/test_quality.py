"""quality.py's arithmetic, on distributions that are known whole."""

import math
import random
import sys
from types import SimpleNamespace

import pytest

from ci.common import ROOT, run

pytestmark = pytest.mark.section("See what FP8 does to the answers")


def distribution(chance: random.Random) -> dict[str, float]:
    weights = [chance.expovariate(1) for _ in range(50)]
    return {str(token): math.log(weight / sum(weights)) for token, weight in enumerate(weights)}


def likeliest(whole: dict[str, float], count: int = 20) -> dict[str, float]:
    return dict(sorted(whole.items(), key=lambda one: -one[1])[:count])


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import quality

    return quality


def test_divergence_is_that_of_the_distributions_or_less(quality):
    chance = random.Random(0)
    for _ in range(50):
        before, after = distribution(chance), distribution(chance)
        true = sum(math.exp(before[token]) * (before[token] - after[token]) for token in before)
        assert quality.divergence(before, after) == pytest.approx(true, abs=1e-6)
        assert 0 < quality.divergence(likeliest(before), likeliest(after)) <= true + 1e-9
        assert quality.divergence(likeliest(before), likeliest(before)) == 0


def test_text_is_asked_for_by_paragraphs(quality, monkeypatch):
    asked, place = [], {"5": {"logprob": -0.5, "rank": 1}}

    def create(**request):
        asked.append(request)
        return SimpleNamespace(choices=[SimpleNamespace(prompt_logprobs=[None, place, place])])

    client = SimpleNamespace(completions=SimpleNamespace(create=create))
    monkeypatch.setattr(quality, "OpenAI", lambda **settings: client)
    assert quality.distributions("One.\n\nTwo.\n\n\n") == [{"5": -0.5}] * 4
    assert [one["prompt"] for one in asked] == ["One.", "Two."]
    assert asked[0]["extra_body"] == {"prompt_logprobs": 20}


def test_what_is_missing_is_named():
    result = run(sys.executable, "quality.py", "README.md")
    assert result.returncode == 2 and "the following arguments are required: kept" in result.stdout
