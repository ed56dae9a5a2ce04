// OpenAI's official client for JavaScript.

import assert from "node:assert/strict";

import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

import { exercises, server } from "./harness.mjs";

const options = { baseURL: server.baseURL, apiKey: server.key, maxRetries: 0 };
const client = new OpenAI(options);
const short = {
  model: server.model,
  messages: [{ role: "user", content: "Tell me a long story." }],
  max_completion_tokens: 8,
  temperature: 0.8,
  seed: 4,
};
const cities = ["Paris", "Rome"];
const Animal = z.object({ name: z.string().max(12), legs: z.int().min(0).max(9), sound: z.enum(["meow", "woof"]) });
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    parameters: {
      type: "object",
      properties: { city: { type: "string", enum: cities } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

await exercises("chat", "streaming", "usage")(async function answerAndStream() {
  const answer = await client.chat.completions.create(short);
  let text = "";
  let usage;
  const stream = await client.chat.completions.create({
    ...short,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.ok(text);
  assert.equal(text, answer.choices[0].message.content);
  assert.equal(answer.usage.completion_tokens, 8);
  assert.equal(usage.completion_tokens, 8);
});

await exercises("tools", "streaming")(async function tools() {
  const named = { type: "function", function: { name: "get_weather" } };
  for (const tool_choice of ["required", named]) {
    const fields = { ...short, tools: [weather], tool_choice, parallel_tool_calls: false, max_completion_tokens: 60 };
    const [call] = (await client.chat.completions.create(fields)).choices[0].message.tool_calls;
    const streamed = await client.chat.completions.stream(fields).finalFunctionToolCall();
    assert.equal(call.function.name, "get_weather");
    assert.ok(cities.includes(JSON.parse(call.function.arguments).city));
    assert.equal(streamed.arguments, call.function.arguments);
  }
});

await exercises("tools")(async function toolsThatAreRun() {
  const asked = [];
  const run = (fields) => asked.push(fields.city) && "Rain.";
  const tool = { ...weather, function: { ...weather.function, function: run, parse: JSON.parse } };
  const named = { type: "function", function: { name: "get_weather" } };
  const runner = client.chat.completions.runTools({ ...short, tools: [tool], tool_choice: named, max_completion_tokens: 60 });
  await runner.done();
  assert.equal(asked.length, 1);
  assert.ok(cities.includes(asked[0]));
});

await exercises("structured output", "streaming")(async function structuredOutput() {
  const fields = { ...short, max_completion_tokens: 120, response_format: zodResponseFormat(Animal, "animal") };
  const animal = (await client.chat.completions.parse(fields)).choices[0].message.parsed;
  assert.deepEqual(Animal.parse(animal), animal);
  const streamed = await client.chat.completions.stream(fields).finalChatCompletion();
  assert.deepEqual(streamed.choices[0].message.parsed, animal);
});

await exercises("logprobs")(async function logprobs() {
  const [choice] = (await client.chat.completions.create({ ...short, logprobs: true, top_logprobs: 2 })).choices;
  assert.equal(choice.logprobs.content.map((token) => token.token).join(""), choice.message.content);
  assert.ok(choice.logprobs.content.every((token) => token.top_logprobs.length === 2));
});

await exercises("completions", "streaming")(async function completions() {
  const fields = { model: server.model, prompt: "Once upon a time", max_tokens: 6, seed: 1 };
  let text = "";
  for await (const chunk of await client.completions.create({ ...fields, stream: true })) {
    text += chunk.choices[0].text;
  }
  assert.ok(text);
  assert.equal((await client.completions.create(fields)).choices[0].text, text);
});

await exercises("responses", "streaming")(async function responses() {
  const fields = { model: server.model, input: "Hello!", max_output_tokens: 16, temperature: 0 };
  const { output_text } = await client.responses.create(fields);
  let text = "";
  for await (const event of await client.responses.create({ ...fields, stream: true })) {
    text += event.type === "response.output_text.delta" ? event.delta : "";
  }
  assert.ok(text);
  assert.equal(text, output_text);
});

await exercises("models")(async function models() {
  assert.deepEqual((await client.models.list()).data.map((model) => model.id), [server.model]);
});

await exercises("errors")(async function errors() {
  const ask = (fields) => client.chat.completions.create({ ...short, ...fields });
  const stranger = new OpenAI({ ...options, apiKey: "wrong" });
  await assert.rejects(stranger.chat.completions.create(short), OpenAI.AuthenticationError);
  const refused = (kind, param) => (error) => error instanceof kind && error.param === param && Boolean(error.requestID);
  await assert.rejects(ask({ model: "gpt-4" }), refused(OpenAI.NotFoundError, "model"));
  await assert.rejects(ask({ temperature: 3 }), refused(OpenAI.BadRequestError, "temperature"));
  await assert.rejects(ask({ temperature: 3, stream: true }), refused(OpenAI.BadRequestError, "temperature"));
});
