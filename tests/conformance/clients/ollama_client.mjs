// Ollama's official client for JavaScript.

import assert from "node:assert/strict";

import { Ollama } from "ollama";
import { z } from "zod";

import { exercises, server } from "./harness.mjs";

const client = new Ollama({ host: server.url, headers: { Authorization: `Bearer ${server.key}` } });
const options = { num_predict: 8, temperature: 0.8, seed: 4, num_ctx: 2048 };
const short = { model: server.model, messages: [{ role: "user", content: "Tell me a long story." }], options };
const cities = ["Paris", "Rome"];
const Animal = z.object({ name: z.string().max(12), legs: z.int().min(0).max(9), sound: z.enum(["meow", "woof"]) });
const weather = {
  type: "function",
  function: {
    name: "get_weather",
    description: "The weather now",
    strict: true,
    parameters: z.toJSONSchema(z.strictObject({ city: z.enum(cities) })),
  },
};

await exercises("chat", "streaming", "usage")(async function answerAndStream() {
  const answer = await client.chat(short);
  let text = "";
  let last;
  for await (const part of await client.chat({ ...short, stream: true })) {
    text += part.message.content;
    last = part;
  }
  assert.ok(text);
  assert.equal(text, answer.message.content);
  assert.deepEqual([last.done, last.done_reason, last.eval_count, answer.eval_count], [true, "length", 8, 8]);
  assert.ok(last.total_duration >= last.prompt_eval_duration + last.eval_duration);
});

await exercises("streaming")(async function anAbortedStream() {
  const stream = await client.chat({ ...short, options: { ...options, num_predict: 2000 }, stream: true });
  const read = async () => {
    for await (const part of stream) {
      assert.equal(part.done, false);
      stream.abort();
    }
  };
  await assert.rejects(read(), { name: "AbortError" });
});

// A format makes the model write a call, since this API has no other way to force one.
await exercises("tools", "streaming")(async function tools() {
  const call = z.object({ name: z.literal("get_weather"), arguments: z.object({}) });
  const messages = [{ role: "user", content: "What is the weather in Paris?" }];
  const fields = {
    ...{ model: server.model, messages, tools: [weather], format: z.toJSONSchema(call) },
    options: { ...options, num_predict: 60 },
  };
  const answer = await client.chat(fields);
  const [asked] = answer.message.tool_calls;
  assert.equal(asked.function.name, "get_weather");
  assert.ok(cities.includes(asked.function.arguments.city));
  const streamed = [];
  for await (const part of await client.chat({ ...fields, stream: true })) {
    streamed.push(...(part.message.tool_calls ?? []));
  }
  assert.deepEqual(streamed.map((each) => each.function), [asked.function]);
  const result = { role: "tool", tool_name: "get_weather", content: "Rain." };
  assert.ok((await client.chat({ ...short, messages: [...messages, answer.message, result] })).message.content);
});

await exercises("structured output")(async function structuredOutput() {
  const fields = { ...short, options: { ...options, num_predict: 120 } };
  for (const format of [z.toJSONSchema(Animal), "json"]) {
    const { message, done_reason } = await client.chat({ ...fields, format });
    if (done_reason === "stop") {
      JSON.parse(message.content);
    }
    if (format !== "json") {
      Animal.parse(JSON.parse(message.content));
    }
  }
});

await exercises("logprobs")(async function logprobs() {
  const answer = await client.chat({ ...short, logprobs: true, top_logprobs: 2 });
  assert.equal(answer.logprobs.map((token) => token.token).join(""), answer.message.content);
  assert.ok(answer.logprobs.every((token) => token.top_logprobs.length === 2));
});

await exercises("completions", "streaming")(async function generate() {
  for (const raw of [false, true]) {
    const fields = { model: server.model, prompt: "Once upon a time", raw, options };
    let text = "";
    for await (const part of await client.generate({ ...fields, stream: true })) {
      text += part.response;
    }
    assert.ok(text);
    assert.equal((await client.generate(fields)).response, text);
  }
});

await exercises("embeddings")(async function embeddings() {
  const { embeddings } = await client.embed({ model: server.model, input: ["Hello", "world"], dimensions: 8 });
  assert.deepEqual(embeddings.map((vector) => vector.length), [8, 8]);
});

await exercises("models")(async function models() {
  const [listed] = (await client.list()).models;
  assert.equal(listed.model, `${server.model}:latest`);
  assert.equal((await client.ps()).models[0].name, listed.name);
  const shown = await client.show({ model: listed.model });
  assert.ok(shown.capabilities.includes("completion"));
  assert.equal(shown.model_info["llama.context_length"], 4096);
  assert.match((await client.version()).version, /^\d+\.\d+\.\d+$/);
});

await exercises("errors")(async function errors() {
  const refused = (status, text) => (error) => error.status_code === status && error.message.includes(text);
  const stranger = new Ollama({ host: server.url, headers: { Authorization: "Bearer wrong" } });
  await assert.rejects(stranger.chat(short), refused(401, "key"));
  await assert.rejects(client.chat({ ...short, model: "gpt-4" }), refused(404, "gpt-4"));
  const stop = Array.from({ length: 65 }, (_, number) => `stop ${number}`);
  for (const stream of [false, true]) {
    await assert.rejects(client.chat({ ...short, options: { stop }, stream }), refused(400, "options.stop"));
  }
  await assert.rejects(client.pull({ model: "llama3.2" }), refused(501, "pull"));
});
