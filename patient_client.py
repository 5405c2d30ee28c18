# patient_client.py
import os
import random

import openai
from tenacity import retry, retry_if_exception, stop_after_attempt, stop_before_delay

client = openai.OpenAI(
    base_url=os.environ.get("BASE_URL", "http://localhost:8000").rstrip("/") + "/v1",
    api_key=os.environ.get("API_KEY", "FAKE_KEY"),
    timeout=openai.Timeout(300, connect=5),  # Seconds without a byte, also before the first token
    max_retries=0,  # Tenacity tries again, also after a stream that broke.
)
gives_up = stop_before_delay(600) | stop_after_attempt(12)


def is_temporary(error: BaseException) -> bool:
    status = getattr(error, "status_code", 503)  # A connection or a stream that broke has none.
    return isinstance(error, (openai.APIError, ConnectionError)) and (status == 429 or status >= 500)


def wait_s(state) -> float:
    asked = getattr(getattr(state.outcome.exception(), "response", None), "headers", {}).get("Retry-After", "")
    return (min(int(asked), 60) if asked.isdigit() else 0) + random.uniform(0, min(2**state.attempt_number, 60))


@retry(retry=retry_if_exception(is_temporary), wait=wait_s, stop=gives_up, reraise=True)
def ask(question: str) -> str:
    request = dict(model="my-llama-3.1-8b", messages=[{"role": "user", "content": question}], max_tokens=1000)
    stream = client.chat.completions.create(**request, stream=True)
    choices = [choice for chunk in stream for choice in chunk.choices]
    if not choices or choices[-1].finish_reason is None:
        raise ConnectionError("The stream broke off before the answer was complete.")
    if choices[-1].finish_reason != "stop":
        raise ValueError(f"The answer isn't whole: {choices[-1].finish_reason}.")
    return "".join(choice.delta.content or "" for choice in choices)


if __name__ == "__main__":
    print(ask("Tell me a joke"))
