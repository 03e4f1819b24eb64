// What the server shows at /: the chat beside the experts at work, and the load page. Here its parts are put together.

import { Api, ApiError, poll } from "./api.js";
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { ExpertsPanel } from "./experts.js";
import { numWaiting } from "./history.js";
import { LoadPage } from "./load.js";
import { recall, remember } from "./storage.js";
import { scheme, setUpTheme } from "./theme.js";

const KEY = "moesaic.key";
const POLL_SECONDS = 1;
// A server answers between two steps; one that has not for so long may be gone without the browser's noticing.
const LATE_SECONDS = 10;
// Where open settings leave no room for the experts, or for the conversation (style.css).
const isNarrow = window.matchMedia("(max-width: 860px)");

const api = new Api();
const experts = new ExpertsPanel({ scheme });
const load = new LoadPage();
let model = null;

function setStatus(text, state, details = "") {
  const status = byId("status");
  status.textContent = text;
  status.title = details;
  byId("load-page").classList.toggle("stale", state !== "ready");
  if (status.dataset.state === state) return;
  // Spoken when the state changes, not whenever another request runs.
  status.dataset.state = state;
  byId("status-spoken").textContent = state === "ready" ? "The server is ready." : `The server: ${text}.`;
}

function askForKey() {
  byId("settings").open = true;
  byId("key-message").textContent = api.key
    ? "The server does not take this key."
    : "The server takes requests with an API key only.";
  byId("key").focus();
}

/** Return the sampling settings of a request, for which the settings make room, or null after pointing at a wrong one. */
function readSettings() {
  const fields = { temperature: "temperature", top_p: "top-p", max_tokens: "max-tokens", seed: "seed" };
  const settings = model === null ? {} : { model };
  for (const [name, id] of Object.entries(fields)) {
    const input = byId(id);
    if (!input.checkValidity()) {
      byId("settings").open = true;
      byId("settings-message").textContent = `${input.labels[0].textContent}: ${input.validationMessage}`;
      input.focus();
      return null;
    }
    if (input.value !== "") settings[name] = Number(input.value);
  }
  byId("settings-message").textContent = "";
  if (isNarrow.matches) byId("settings").open = false;
  return settings;
}

const chat = new Chat({
  api,
  settings: readSettings,
  askForKey,
  wantsExperts: () => !experts.isDense,
  showToken: (detail, isFollowing) => experts.setToken(detail, isFollowing),
});

async function learnModel() {
  const { data } = await api.get("v1/models");
  const [first] = data;
  if (model !== null) experts.setToken(null); // it was another model's
  model = first.id;
  if (typeof first.has_chat_template === "boolean") chat.hasTemplate = first.has_chat_template;
  byId("model").textContent = model;
  document.title = `${model} – moesaic`;
  chat.describeModel();
}

/** Ask the server for its state; return whether it answered. */
async function look() {
  const asked = performance.now() / 1000;
  const late = setTimeout(() => setStatus("no answer yet", "away"), 1000 * LATE_SECONDS);
  try {
    const [activity, stats] = await Promise.all([api.get("v1/experts"), api.get("v1/stats")]);
    // Also after a restart with another model.
    if (model === null || model !== stats.model) await learnModel();
    experts.setLoad(activity);
    load.add(stats, experts.hasExperts, asked);
    const numWaits = numWaiting(stats);
    const waiting = numWaits ? `, ${numWaits} waiting` : "";
    setStatus(stats.num_running || numWaits ? `${stats.num_running} running${waiting}` : "idle", "ready");
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) setStatus(api.key ? "wrong API key" : "needs an API key", "key", error.message);
    else setStatus(error.status ? `error ${error.status}` : "no answer", "away", error.message);
    return false;
  } finally {
    clearTimeout(late);
  }
}

/**
 * Take the key of the form; return whether it is one that a request can carry. A message stays: leaving the field is the
 * first half of a click on the button, which would not be there any more for the second.
 */
function useKey() {
  const key = byId("key").value.trim();
  const isKey = /^[!-~]*$/.test(key);
  api.key = isKey ? key : "";
  remember("sessionStorage", KEY, byId("keep-key").checked && api.key ? api.key : null);
  if (!isKey) byId("key-message").textContent = "Keys have letters, digits and signs of ASCII only, and no spaces.";
  return isKey;
}

api.key = recall("sessionStorage", KEY) ?? "";
byId("key").value = api.key;
byId("keep-key").checked = api.key !== "";
byId("key").addEventListener("change", useKey);
byId("key").addEventListener("input", () => (byId("key-message").textContent = ""));
byId("keep-key").addEventListener("change", useKey);
byId("settings").addEventListener("input", () => (byId("settings-message").textContent = ""));
const lookAgain = poll(look, POLL_SECONDS);

byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (!useKey()) return;
  byId("key-message").textContent = "";
  byId("composer-text").focus();
  await lookAgain();
  chat.retryAfterKey();
});

function showPage() {
  const isLoad = location.hash === "#load";
  byId("load-page").hidden = !isLoad;
  byId("chat-page").hidden = isLoad;
  byId("to-load").setAttribute("aria-current", isLoad ? "page" : "false");
  byId("to-chat").setAttribute("aria-current", isLoad ? "false" : "page");
  if (isLoad) load.refresh();
  else experts.recolor();
  // The link to the message field leads here from the load page too, where the field was hidden when it was followed.
  if (location.hash === "#composer-text") byId("composer-text").focus();
}

window.addEventListener("hashchange", showPage);
setUpTheme(byId("theme"), () => experts.recolor());
showPage();
