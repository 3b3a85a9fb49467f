// Asks a server through the openai package for Node; prints what came back as one JSON object.
// node node_sdk.mjs BASE_URL    (run by test_node_sdk.py, in a folder with the package installed)

import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "EMPTY", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const ask = { model: "default", messages, temperature: 0, max_tokens: 20 };

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    const { status, code, type, param, message, requestID } = error;
    return { kind: error.constructor.name, status, code, type, param, message, requestID };
  }
  return null;
}

async function streamed() {
  const pieces = [];
  let usage = null;
  const stream = await client.chat.completions.create({
    ...ask,
    stream: true,
    stream_options: { include_usage: true },
  });
  for await (const chunk of stream) {
    pieces.push(chunk.choices[0]?.delta?.content ?? "");
    usage = chunk.usage ?? usage;
  }
  return { text: pieces.join(""), usage };
}

const chat = await client.chat.completions.create(ask);
const runner = client.chat.completions.stream({ ...ask, n: 2, logprobs: true, top_logprobs: 2 });
const accumulated = await runner.finalChatCompletion();
const scored = await client.completions.create({
  model: "default", prompt: "One two three", echo: true, logprobs: 1, max_tokens: 0,
});
const models = await client.models.list();

console.log(
  JSON.stringify({
    chat,
    requestId: chat._request_id,
    streamed: await streamed(),
    accumulated,
    scored,
    model: await client.models.retrieve(models.data[0].id),
    badValue: await refusal(() => client.chat.completions.create({ ...ask, temperature: -1 })),
    badStream: await refusal(() => client.chat.completions.create({ ...ask, stream: true, n: 0 })),
    noModel: await refusal(() => client.chat.completions.create({ ...ask, model: "nobody" })),
    tooLong: await refusal(() => client.completions.create({ model: "default", prompt: "x ".repeat(9000) })),
  }),
);
