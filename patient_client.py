# patient_client.py
import os
import random
import sys

import openai
from tenacity import retry, retry_if_exception, stop_after_delay

client = openai.OpenAI(
    base_url=os.environ.get("BASE_URL", "http://localhost:8000").rstrip("/") + "/v1",
    api_key=os.environ.get("API_KEY", "FAKE_KEY"),
    timeout=openai.Timeout(60, connect=5),  # Seconds without a byte
    max_retries=0,  # Tenacity tries again, also after a stream that broke.
)


def is_temporary(error: BaseException) -> bool:
    status = getattr(error, "status_code", 503)  # A connection or a stream that broke has none.
    return isinstance(error, (openai.APIError, ConnectionError)) and (status == 429 or status >= 500)


def wait_s(state) -> float:
    headers = getattr(getattr(state.outcome.exception(), "response", None), "headers", {})
    return float(headers.get("Retry-After", 0)) + random.uniform(0, min(2**state.attempt_number, 30))


@retry(retry=retry_if_exception(is_temporary), wait=wait_s, stop=stop_after_delay(600), reraise=True)
def ask(question: str) -> str:
    messages = [{"role": "user", "content": question}]
    stream = client.chat.completions.create(model="my-llama-3.1-8b", messages=messages, stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices]
    if not any(choice.finish_reason for choice in choices):
        raise ConnectionError("The stream broke off before the answer was complete.")
    return "".join(choice.delta.content or "" for choice in choices)


if __name__ == "__main__":
    print(ask(sys.argv[1]))
