// Ask the app of beyond_chat.ipynb for JSON and for a call, with each JavaScript client. Fails on a wrong answer.
// The app runs on http://localhost:8000, see ci/README.md.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = (process.env.BASE_URL ?? "http://localhost:8000") + "/v1";
const model = "my-llama-3.1-8b";
const sentence = "Ada is 36 and lives in London. Answer in JSON.";
const question = "What is the weather in Paris?";
const Person = z.object({ name: z.string(), age: z.int(), city: z.string() });
const City = z.object({ city: z.string() });
const ada = { name: "Ada", age: 36, city: "London" };
const result = "21 degrees";
const answer = "It is 21 degrees in Paris.";

async function withOpenAI() {
  const client = new OpenAI({ baseURL, apiKey: "FAKE_KEY" });
  const asked = { model, temperature: 0, max_tokens: 100 };
  const format = zodResponseFormat(Person, "person");
  const messages = [{ role: "user", content: sentence }];
  const parsed = await client.chat.completions.parse({ ...asked, messages, response_format: format });
  assert.deepEqual(parsed.choices[0].message.parsed, ada);
  const runner = client.chat.completions.runTools({
    ...asked,
    messages: [{ role: "user", content: question }],
    tools: [zodFunction({ name: "get_weather", parameters: City, function: () => result })],
  });
  assert.equal(await runner.finalContent(), answer);
}

async function withAISDK() {
  const provider = createOpenAICompatible({ name: "ray", baseURL, supportsStructuredOutputs: true });
  const asked = { model: provider(model), temperature: 0, maxOutputTokens: 100 };
  const { output } = await generateText({ ...asked, prompt: sentence, output: Output.object({ schema: Person }) });
  assert.deepEqual(output, ada);
  const tools = { get_weather: tool({ inputSchema: City, execute: async () => result }) };
  const loop = { ...asked, prompt: question, tools, stopWhen: stepCountIs(5) };
  assert.equal((await generateText(loop)).text, answer);
  assert.equal(await streamText(loop).text, answer);
}

for (const [name, ask] of Object.entries({ openai: withOpenAI, ai: withAISDK })) {
  await ask();
  const { version } = JSON.parse(readFileSync(`node_modules/${name}/package.json`));
  console.log(`${name} ${version} (npm): JSON and calls`);
}
