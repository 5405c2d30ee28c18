# quality.py
import argparse
import json
import math
import os
from pathlib import Path

from openai import OpenAI


def distributions(text: str) -> list[dict[str, float]]:
    """Log probabilities of the 20 likeliest tokens, by ID, at each place but a paragraph's first."""
    base_url = os.environ.get("BASE_URL", "http://localhost:8000").rstrip("/") + "/v1"
    client, places = OpenAI(base_url=base_url, api_key=os.environ.get("API_KEY", "FAKE_KEY")), []
    for paragraph in filter(str.strip, text.split("\n\n")):
        asked = dict(model="my-llama-3.1-8b", prompt=paragraph, max_tokens=1, extra_body={"prompt_logprobs": 20})
        places += client.completions.create(**asked).choices[0].prompt_logprobs[1:]
    return [{token: one["logprob"] for token, one in place.items()} for place in places]


def divergence(before: dict[str, float], after: dict[str, float]) -> float:
    """In nats. Whatever only one of the two names counts as one token, which makes it a lower bound."""
    p, q = ([math.exp(one[token]) for token in before.keys() & after.keys()] for one in (before, after))
    p, q = ([*some, max(1 - sum(some), 1e-9)] for some in (p, q))
    return sum(one * math.log(one / other) for one, other in zip(p, q, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare two deployments by how probable they find a text.")
    parser.add_argument("text", type=Path, help="a file of text like yours")
    parser.add_argument("kept", type=Path, help="what the first deployment said")
    parser.add_argument("--keep", action="store_true", help="write KEPT")
    args = parser.parse_args()
    now = distributions(args.text.read_text())
    if args.keep:
        args.kept.write_text(json.dumps(now))
    pairs = list(zip(json.loads(args.kept.read_text()), now, strict=True))
    mean = sum(divergence(*pair) for pair in pairs) / len(pairs)
    same = sum(max(one, key=one.get) == max(other, key=other.get) for one, other in pairs)
    print(f"{len(pairs)} tokens: mean KL divergence {mean:.2g} nats, the same top token at {same / len(pairs):.1%}")
