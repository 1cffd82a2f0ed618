"use strict";
// Chat with the model behind this page; a coloured cell for each token says with how many bits it was made.
const at = (id) => document.getElementById(id);
const messages = [];
let running = null;

const headers = () => {
  const key = at("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

function turn(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  at("turns").append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

const bits = new Map();
function cell(width) {
  const mark = document.createElement("span");
  mark.className = `b${width}`;
  mark.title = `${width} bits`;
  at("strip").append(mark);
  bits.set(width, (bits.get(width) ?? 0) + 1);
}

function account() {
  const total = [...bits.values()].reduce((a, b) => a + b, 0);
  const mean = [...bits].reduce((sum, [width, count]) => sum + width * count, 0) / total;
  const counts = [...bits].sort((a, b) => b[0] - a[0]).map(([width, count]) => `${count} at ${width} bits`);
  const words = total ? `${total} tokens, ${mean.toFixed(2)} bits on average: ${counts.join(", ")}` : "No token yet.";
  at("account").textContent = words;
  at("strip").setAttribute("aria-label", words);
}

function asked() {
  const body = { messages, stream: true, temperature: Number(at("temperature").value), draft: at("draft").value };
  if (at("precision").value) body.precision = Number(at("precision").value);
  if (at("schedule").value.trim()) body.schedule = at("schedule").value.trim();
  else if (body.precision) body.schedule = String(body.precision);
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
  }
}

async function answer() {
  running = new AbortController();
  const request = { method: "POST", headers: headers(), body: JSON.stringify(asked()), signal: running.signal };
  const response = await fetch("v1/chat/completions", request);
  if (!response.ok) throw new Error((await response.json()).error.message);
  const item = turn("assistant", "");
  try {
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      item.textContent += event.choices[0]?.delta.content ?? "";
      event.anybit.bits.forEach(cell);
      account();
      item.scrollIntoView({ block: "end" });
    }
  } finally {
    messages.push({ role: "assistant", content: item.textContent });
  }
}

function busy(now) {
  at("send").hidden = now;
  at("stop").hidden = !now;
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = at("text").value.trim();
  if (!text || running) return;
  at("text").value = "";
  messages.push({ role: "user", content: text });
  turn("user", text);
  bits.clear();
  at("strip").replaceChildren();
  account();
  busy(true);
  try {
    await answer();
  } catch (error) {
    if (error.name !== "AbortError") turn("error", error.message);
    if (messages.at(-1).role === "user") messages.pop(); // unanswered: many templates refuse two in a row
  } finally {
    running = null;
    busy(false);
    at("text").focus();
  }
});
at("stop").addEventListener("click", () => running?.abort());
at("settings").addEventListener("submit", (event) => event.preventDefault());
at("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    at("ask").requestSubmit();
  }
});

async function begin() {
  const health = await (await fetch("health")).json();
  at("model").textContent = health.model;
  document.title = `${health.model} · anybit`;
  const select = at("precision");
  select.append(new Option("all that is stored", ""));
  if (health.precisions.length > 1) for (const width of [...health.precisions].reverse()) select.append(new Option(`${width} bits`, width));
}
begin();
