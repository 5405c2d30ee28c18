# client.py
import os

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BASE_URL", "http://localhost:8000").rstrip("/") + "/v1",
    api_key=os.environ.get("API_KEY", "FAKE_KEY"),
)
stream = client.chat.completions.create(
    model="my-llama-3.1-8b",
    messages=[{"role": "user", "content": "Tell me a joke"}],
    stream=True,
)
finish_reason = None
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
        finish_reason = choice.finish_reason or finish_reason
print()
if finish_reason is None:
    raise SystemExit("The stream broke off before the answer was complete.")
