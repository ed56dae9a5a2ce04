// Short conversations with JavaScript libraries, as libraries.py has them: `node libraries.mjs NAME URL FOLDER`. The
// library is in FOLDER/node_modules.

import { createRequire } from "node:module";

const [name, url, folder] = process.argv.slice(2);
const load = createRequire(`${folder}/libraries.js`);
const MODEL = "tiny";
const KEY = "none";

async function add({ a, b }) {
  return `marker-${a + b}`;
}

function described() {
  const z = load("zod");
  return { name: "add", description: "Add two numbers.", parameters: z.object({ a: z.number(), b: z.number() }) };
}

const libraries = {
  async librechat() {
    const { Run, Providers } = load("@librechat/agents");
    const { HumanMessage } = load("@langchain/core/messages");
    const { tool } = load("@langchain/core/tools");
    const { parameters, ...names } = described();
    const llmConfig = { provider: Providers.OPENAI, model: MODEL, apiKey: KEY, user: "u", streaming: true };
    llmConfig.configuration = { baseURL: url };
    const graphConfig = { type: "standard", llmConfig, instructions: "Be nice." };
    graphConfig.tools = [tool(add, { ...names, schema: parameters })];
    const run = await Run.create({ runId: "r", graphConfig, returnContent: true });
    const config = { configurable: { thread_id: "t" }, streamMode: "values", version: "v2" };
    const content = await run.processStream({ messages: [new HumanMessage("hello")] }, config);
    console.log(JSON.stringify(content));
    const clientOptions = { ...llmConfig, streaming: false };
    const title = { provider: Providers.OPENAI, inputText: "hello", contentParts: [], clientOptions, chainOptions: {} };
    console.log(await run.generateTitle({ ...title, titleMethod: "completion" }));
  },

  async langchain() {
    const { ChatOpenAI, OpenAIEmbeddings } = load("@langchain/openai");
    const { tool } = load("@langchain/core/tools");
    const { parameters, ...names } = described();
    const options = { model: MODEL, apiKey: KEY, configuration: { baseURL: url } };
    for (const useResponsesApi of [false, true]) {
      const model = new ChatOpenAI({ ...options, useResponsesApi });
      console.log((await model.invoke("hello")).text);
      for await (const chunk of await model.stream("hello")) console.log(chunk.text);
      const add_tool = tool(add, { ...names, schema: parameters });
      const { tool_calls } = await model.bindTools([add_tool]).invoke("hello");
      console.log((await add_tool.invoke(tool_calls[0])).content);
    }
    console.log((await new OpenAIEmbeddings(options).embedQuery("hello")).length);
  },

  async agents() {
    const { Agent, OpenAIProvider, Runner, setTracingDisabled, tool } = load("@openai/agents");
    setTracingDisabled(true);
    for (const useResponses of [false, true]) {
      const runner = new Runner({ modelProvider: new OpenAIProvider({ apiKey: KEY, baseURL: url, useResponses }) });
      const agent = new Agent({ name: "A", instructions: "Be nice.", model: MODEL });
      console.log((await runner.run(agent, "hello")).finalOutput);
      const helper = agent.clone({ tools: [tool({ ...described(), execute: add })] });
      const streamed = await runner.run(helper, "hello", { stream: true });
      for await (const event of streamed) void event;
      console.log(streamed.finalOutput);
    }
  },
};

await libraries[name]();
process.exit(0); // some libraries keep timers
