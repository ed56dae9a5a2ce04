// Vercel's AI SDK with its provider for OpenAI-compatible servers.

import assert from "node:assert/strict";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

import { exercises, server } from "./harness.mjs";

const provider = (apiKey) =>
  createOpenAICompatible({
    name: "lightwell",
    baseURL: server.baseURL,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const lightwell = provider(server.key);
const short = {
  model: lightwell(server.model),
  prompt: "Tell me a long story.",
  maxOutputTokens: 8,
  temperature: 0.8,
  seed: 4,
  maxRetries: 0,
};
const cities = ["Paris", "Rome"];
const Animal = z.object({ name: z.string().max(12), legs: z.int().min(0).max(9), sound: z.enum(["meow", "woof"]) });

await exercises("chat", "streaming", "usage")(async function answerAndStream() {
  const answer = await generateText(short);
  const stream = streamText(short);
  let text = "";
  for await (const part of stream.textStream) {
    text += part;
  }
  assert.ok(text);
  assert.equal(text, answer.text);
  assert.equal(answer.usage.outputTokens, 8);
  assert.equal((await stream.usage).outputTokens, 8);
  assert.equal(await stream.finishReason, "length");
});

await exercises("structured output", "streaming")(async function structuredOutput() {
  const fields = { ...short, schema: Animal, maxOutputTokens: 120 };
  const { object } = await generateObject(fields);
  assert.deepEqual(Animal.parse(object), object);
  let last;
  for await (const partial of streamObject(fields).partialObjectStream) {
    last = partial;
  }
  assert.deepEqual(last, object);
});

await exercises("tools", "streaming")(async function tools() {
  const execute = async ({ city }) => `Rain in ${city}.`;
  const weather = tool({ description: "Now", inputSchema: z.object({ city: z.enum(cities) }), execute });
  const providerOptions = { lightwell: { parallel_tool_calls: false } };
  const fields = { ...short, tools: { weather }, maxOutputTokens: 60, stopWhen: stepCountIs(1), providerOptions };
  for (const toolChoice of ["required", { type: "tool", toolName: "weather" }]) {
    const answer = await generateText({ ...fields, toolChoice });
    const streamed = await streamText({ ...fields, toolChoice }).toolCalls;
    assert.ok(cities.includes(answer.toolCalls[0].input.city));
    assert.equal(answer.toolResults[0].output, `Rain in ${answer.toolCalls[0].input.city}.`);
    assert.equal(answer.toolCalls.length, 1);
    assert.deepEqual(streamed[0].input, answer.toolCalls[0].input);
  }
});

await exercises("tools")(async function aConversationWithCalls() {
  const call = { toolCallId: "call_1", toolName: "weather" };
  const messages = [
    { role: "user", content: "What is the weather in Paris?" },
    { role: "assistant", content: [{ type: "tool-call", ...call, input: { city: "Paris" } }] },
    { role: "tool", content: [{ type: "tool-result", ...call, output: { type: "text", value: "Rain." } }] },
  ];
  assert.ok((await generateText({ ...short, prompt: undefined, messages })).text);
});

await exercises("completions", "streaming")(async function completions() {
  const fields = { ...short, model: lightwell.completionModel(server.model) };
  const { text } = await generateText(fields);
  assert.ok(text);
  assert.equal(await streamText(fields).text, text);
});

await exercises("errors")(async function errors() {
  const refused = (status, said) => (error) =>
    APICallError.isInstance(error) && error.statusCode === status && error.message.includes(said);
  await assert.rejects(generateText({ ...short, model: provider("wrong")(server.model) }), refused(401, "API key"));
  await assert.rejects(generateText({ ...short, model: lightwell("gpt-4") }), refused(404, "gpt-4"));
  await assert.rejects(generateText({ ...short, temperature: 3 }), refused(400, "temperature"));
});
