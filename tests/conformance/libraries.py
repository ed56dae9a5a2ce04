"""Short conversations with Python libraries: `python libraries.py NAME URL` prints what each one answered.

Runs in an environment that has the library. Where it knows tools, it offers one that adds two numbers.
"""

import asyncio
import os
import sys
from typing import Any, Literal

from pydantic import BaseModel

MODEL, KEY = "tiny", "none"
URL = sys.argv[2] if len(sys.argv) > 2 else ""


class Answer(BaseModel):
    text: str


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return f"marker-{a + b}"


def autogen() -> None:
    from autogen_agentchat.agents import AssistantAgent
    from autogen_core.models import ModelInfo
    from autogen_ext.models.openai import OpenAIChatCompletionClient

    info = ModelInfo(vision=False, function_calling=True, json_output=True, family="unknown", structured_output=True)

    async def ask() -> None:
        client = OpenAIChatCompletionClient(model=MODEL, base_url=URL, api_key=KEY, model_info=info)
        for stream in (False, True):
            agent = AssistantAgent("a", client, tools=[add], model_client_stream=stream, reflect_on_tool_use=True)
            print([message.model_dump().get("content") for message in (await agent.run(task="hello")).messages])

    asyncio.run(ask())


def crewai() -> None:
    os.environ |= {"CREWAI_DISABLE_TELEMETRY": "true", "OTEL_SDK_DISABLED": "true"}
    from crewai import LLM, Agent, Crew, Task
    from crewai.tools import tool

    llm = LLM(model=f"openai/{MODEL}", base_url=URL, api_key=KEY)
    print(llm.call("hello"))
    agent = Agent(role="r", goal="g", backstory="b", llm=llm, tools=[tool("add")(add)], max_iter=2)
    print(Crew(agents=[agent], tasks=[Task(description="hello", expected_output="x", agent=agent)]).kickoff())


def dspy() -> None:
    from dspy import LM

    for kind, model in (("chat", "openai"), ("responses", "openai"), ("text", "text-completion-openai")):
        lm = LM(f"{model}/{MODEL}", model_type=kind, api_base=URL, api_key=KEY, cache=False, num_retries=0)
        print(lm("hello", temperature=0.7))


def haystack() -> None:
    from haystack.components.agents import Agent
    from haystack.components.embedders import OpenAITextEmbedder
    from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.tools import tool
    from haystack.utils import Secret

    options: dict[str, Any] = {"model": MODEL, "api_key": Secret.from_token(KEY), "api_base_url": URL}
    hello = [ChatMessage.from_user("hello")]
    for kind in (OpenAIChatGenerator, OpenAIResponsesChatGenerator):
        generator = kind(**options)
        print(generator.run(hello), generator.run(hello, streaming_callback=lambda chunk: None))
        print(Agent(chat_generator=generator, tools=[tool(add)]).run(hello)["messages"][-1].text)
    print(len(OpenAITextEmbedder(**options).run("hello")["embedding"]))


def llama_index() -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    llm = OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=True, is_function_calling_model=True)
    print(llm.complete("hello"), "".join(c.delta or "" for c in llm.stream_chat([ChatMessage("hello")])))
    from llama_index.core.tools import FunctionTool

    print(llm.predict_and_call([FunctionTool.from_defaults(add)], "hello").response)
    print(OpenAILike(model=MODEL, api_base=URL, api_key=KEY, is_chat_model=False).complete("hello"))


def open_webui() -> None:
    """Start the program with an empty folder, and ask as its page does: chat, title, tags, a file to search in."""
    import socket
    import subprocess
    import time

    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = {"DATA_DIR": os.environ["HOME"], "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "none"}
    settings |= {"OFFLINE_MODE": "true", "ENABLE_OLLAMA_API": "false"}
    settings |= {"RAG_EMBEDDING_ENGINE": "openai", "RAG_EMBEDDING_MODEL": MODEL}
    settings |= {f"{part}OPENAI_API_BASE_URL": URL for part in ("", "RAG_")}
    settings |= {f"{part}OPENAI_API_KEY": KEY for part in ("", "RAG_")}
    command = [os.path.dirname(sys.executable) + "/open-webui", "serve", "--host", "127.0.0.1", "--port", port]
    with subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.DEVNULL) as process:
        try:
            client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
            for _ in range(600):
                try:
                    if client.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            signed_in = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
            client.headers["authorization"] = f"Bearer {signed_in['token']}"

            def ask(path: str, **fields: Any) -> httpx.Response:
                return client.post(path, json={"model": MODEL} | fields).raise_for_status()

            print([model["id"] for model in client.get("/api/models").json()["data"]])
            hello = [{"role": "user", "content": "hello"}]
            sampling: dict[str, Any] = {"temperature": 0.5, "top_k": 40, "min_p": 0.05, "seed": 3, "max_tokens": 50}
            sampling |= {"stop": ["a1", "b2", "c3", "d4", "e5"], "logit_bias": "5:10", "reasoning_effort": "low"}
            sampling |= {"num_ctx": 4096, "repeat_last_n": 64, "keep_alive": "5m", "think": True}
            streaming: Any = {"stream": True, "stream_options": {"include_usage": True}, "params": sampling}
            print(ask("/api/chat/completions", messages=hello, **streaming).text)
            print(ask("/api/chat/completions", messages=hello, stream=False).json()["choices"][0]["message"]["content"])
            for task in ("title", "tags", "follow_up"):
                ask(f"/api/v1/tasks/{task}/completions", messages=hello, chat_id="x", stream=False)
            file = client.post("/api/v1/files/", files={"file": ("a.txt", b"A sentence. " * 20, "text/plain")}).json()
            time.sleep(3)
            source = {"type": "file", "id": file["id"], "name": "a.txt"}
            ask("/api/chat/completions", messages=hello, stream=True, files=[source])
            ask("/openai/responses", input="hello")
            ask("/api/v1/messages", messages=hello, max_tokens=20)
        finally:
            process.terminate()


def openai_agents() -> None:
    from agents import Agent, Runner, function_tool, set_default_openai_api, set_tracing_disabled

    os.environ |= {"OPENAI_BASE_URL": URL, "OPENAI_API_KEY": KEY}
    set_tracing_disabled(True)

    async def ask() -> None:
        for api in ("responses", "chat_completions"):
            set_default_openai_api(api)
            agent = Agent(name="A", instructions="Be nice.", model=MODEL, tools=[function_tool(add)])
            print((await Runner.run(agent, "hello")).final_output)
            streamed = Runner.run_streamed(agent, "hello")
            async for _ in streamed.stream_events():
                pass
            print(streamed.final_output)

    asyncio.run(ask())


def outlines() -> None:
    import openai
    from outlines import cfg, from_openai, from_sglang, from_vllm, regex

    client = openai.OpenAI(base_url=URL, api_key=KEY)
    model = from_openai(client, MODEL)
    print(model("hello"), "".join(model.stream("hello")), Answer.model_validate_json(model("hello", Answer)))
    vllm, sglang = from_vllm(client, MODEL), from_sglang(client, MODEL)
    for kind in (Answer, Literal["a", "b"], regex(r"\d{3}"), cfg('start: "a" | "b"')):
        print(vllm("hello", kind))
    for kind in (Answer, regex(r"\d{3}"), cfg('root ::= "a" | "b"')):
        print(sglang("hello", kind))


def semantic_kernel() -> None:
    from openai import AsyncOpenAI
    from semantic_kernel import Kernel
    from semantic_kernel.connectors.ai.function_choice_behavior import FunctionChoiceBehavior
    from semantic_kernel.connectors.ai.open_ai import OpenAIChatCompletion, OpenAIChatPromptExecutionSettings
    from semantic_kernel.contents import ChatHistory
    from semantic_kernel.functions import kernel_function

    async def ask() -> None:
        service = OpenAIChatCompletion(MODEL, async_client=AsyncOpenAI(base_url=URL, api_key=KEY))
        kernel = Kernel(services=service)
        kernel.add_function("plugin", kernel_function(add, name="add"))
        settings = OpenAIChatPromptExecutionSettings(function_choice_behavior=FunctionChoiceBehavior.Auto())
        history = ChatHistory(system_message="Be nice.")
        history.add_user_message("hello")
        print(await service.get_chat_message_content(history, settings, kernel=kernel))
        async for chunks in service.get_streaming_chat_message_contents(history, settings, kernel=kernel):
            print(*chunks, end="")

    asyncio.run(ask())


def smolagents() -> None:
    from smolagents import CodeAgent, OpenAIModel, ToolCallingAgent, tool

    model = OpenAIModel(MODEL, api_base=URL, api_key=KEY)
    print(ToolCallingAgent(tools=[tool(add)], model=model, max_steps=2).run("hello"))
    for streams in (False, True):
        print(CodeAgent(tools=[], model=model, max_steps=1, stream_outputs=streams).run("hello"))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
