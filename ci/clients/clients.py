"""Ask the app of beyond_chat.ipynb for JSON and for a call, with each Python client. Fails on a wrong answer.

The app runs on http://localhost:8000, see ci/README.md.
"""

import os
from importlib.metadata import version

import litellm
import openai
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

BASE_URL, KEY, MODEL = os.environ.get("BASE_URL", "http://localhost:8000") + "/v1", "FAKE_KEY", "my-llama-3.1-8b"
SENTENCE, QUESTION = "Ada is 36 and lives in London. Answer in JSON.", "What is the weather in Paris?"


class Person(BaseModel):
    name: str
    age: int
    city: str


class get_weather(BaseModel):  # LangChain takes the function's name from it.
    """The weather in a city"""

    city: str


ADA, RESULT, ANSWER = Person(name="Ada", age=36, city="London"), "21 degrees", "It is 21 degrees in Paris."
TOOL = openai.pydantic_function_tool(get_weather, name="get_weather")


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def loop(create) -> None:
    """From the question to the answer, with `create(messages)`, which returns a message of OpenAI's form."""
    messages = user(QUESTION)
    called = create(messages)
    [call] = called.tool_calls
    assert (call.function.name, get_weather.model_validate_json(call.function.arguments).city) == (
        "get_weather",
        "Paris",
    )
    messages += [called.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": RESULT}]
    answer = create(messages).content
    assert answer == ANSWER, answer


def with_openai() -> None:
    client = openai.OpenAI(base_url=BASE_URL, api_key=KEY)
    asked = dict(model=MODEL, temperature=0, max_tokens=100)
    parsed = client.chat.completions.parse(messages=user(SENTENCE), response_format=Person, **asked)
    assert parsed.choices[0].message.parsed == ADA
    with client.chat.completions.stream(messages=user(SENTENCE), response_format=Person, **asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == ADA
    loop(
        lambda messages: (
            client.chat.completions.create(messages=messages, tools=[TOOL], parallel_tool_calls=False, **asked)
            .choices[0]
            .message
        )
    )
    with client.chat.completions.stream(messages=user(QUESTION), tools=[TOOL], **asked) as stream:
        [call] = stream.get_final_completion().choices[0].message.tool_calls
    assert call.function.parsed_arguments == get_weather(city="Paris")


def with_litellm() -> None:
    asked = dict(model=f"openai/{MODEL}", api_base=BASE_URL, api_key=KEY, temperature=0, max_tokens=100)
    answer = litellm.completion(messages=user(SENTENCE), response_format=Person, **asked)
    assert Person.model_validate_json(answer.choices[0].message.content) == ADA
    loop(
        lambda messages: (
            litellm.completion(messages=messages, tools=[TOOL], parallel_tool_calls=False, **asked).choices[0].message
        )
    )


def with_langchain() -> None:
    model = ChatOpenAI(base_url=BASE_URL, api_key=KEY, model=MODEL, temperature=0, max_tokens=100)
    for method in ("json_schema", "function_calling"):  # The second requires a call of a function named Person.
        answer = model.with_structured_output(Person, method=method).invoke(SENTENCE)
        assert answer == ADA or method == "function_calling" and isinstance(answer, Person), answer
    messages, tools = [HumanMessage(QUESTION)], model.bind_tools([get_weather])
    messages.append(tools.invoke(messages))
    [call] = messages[-1].tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    messages.append({"role": "tool", "tool_call_id": call["id"], "content": RESULT})
    assert tools.invoke(messages).content == ANSWER


for package, ask in ("openai", with_openai), ("litellm", with_litellm), ("langchain-openai", with_langchain):
    ask()
    print(f"{package} {version(package)}: JSON and calls", flush=True)
