// Tools and structured answers through the openai package for Node; prints what came back as one JSON object.
// node node_tools.mjs BASE_URL    (run by test_node_sdk.py, in a folder with openai and zod installed)

import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "EMPTY", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the weather in Paris?" }];
const tool = zodFunction({
  name: "get_weather",
  description: "Get the weather of a city.",
  parameters: z.object({ city: z.string().max(30) }),
  // As text with spaces, which the bundled model reads more surely than what the package would write.
  function: ({ city }) => `{"temperature": 21, "sky": "sunny", "city": "${city}"}`,
});
const Report = z.object({
  title: z.string().max(20),
  mood: z.enum(["good", "bad"]),
  count: z.number().int().min(0).max(9),
});
const ask = { model: "default", messages, temperature: 0, max_tokens: 300 };
const askForCalls = { ...ask, tools: [tool] };
const demand = { ...askForCalls, tool_choice: "required", parallel_tool_calls: false };
const askForReport = {
  ...ask,
  temperature: 1,
  seed: 1,
  response_format: zodResponseFormat(Report, "report"),
};

const called = await client.chat.completions.stream(askForCalls).finalChatCompletion();
const demanded = await client.chat.completions.parse(demand);
const report = await client.chat.completions.parse(askForReport);
const streamedReport = await client.chat.completions.stream(askForReport).finalChatCompletion();
const loop = client.chat.completions.runTools({ ...askForCalls, stream: true });

console.log(
  JSON.stringify({
    called: called.choices[0],
    demanded: demanded.choices[0],
    report: report.choices[0].message.parsed,
    streamedReport: streamedReport.choices[0].message.parsed,
    answer: await loop.finalContent(),
    roles: loop.messages.map((message) => message.role),
  }),
);
