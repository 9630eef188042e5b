// Asks the gateway for its figures every POLL_SECONDS while the page is seen, and shows them.

import { byId, setText } from "./elements.js";
import { History } from "./history.js";
import { showExplanation, showLedger, showLimits } from "./ledger.js";
import { showNodes, showTiers, showTiersBelow } from "./places.js";
import { showPrefixes, showReplicas, showSources, showSummary, showTransfers } from "./sections.js";
import { seconds } from "./words.js";

const POLL_SECONDS = 2;
const PREFIX_POLLS = 3; // so many polls for one of the prefixes
const ANSWER_SECONDS_MAX = 10;
const PREFIXES_SHOWN = 20;
const KEY = "peerkv-admin-key";

class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let history = new History();
let paused = false;
let polls = 0;
let timer = 0;

const clock = () => performance.now() / 1000;

async function ask(path) {
  const key = sessionStorage.getItem(KEY);
  const answer = await fetch(path, {
    headers: key ? { authorization: `Bearer ${key}` } : {},
    cache: "no-store",
    signal: AbortSignal.timeout(ANSWER_SECONDS_MAX * 1000),
  });
  if (answer.ok) return answer.json();
  const body = await answer.json().catch(() => null);
  throw new Refused(answer.status, body?.error?.message ?? `The gateway answered ${answer.status}.`);
}

async function poll() {
  clearTimeout(timer);
  if (!paused && !document.hidden) {
    try {
      const wanted = byId("models").value;
      const model = wanted && `model=${encodeURIComponent(wanted)}`;
      const stats = await ask(`/kv/stats?${model}`);
      if (polls % PREFIX_POLLS === 0) showPrefixes(await ask(`/kv/prefixes?limit=${PREFIXES_SHOWN}&${model}`));
      polls += 1;
      if (byId("models").value === wanted) show(stats); // else another was chosen meanwhile
    } catch (error) {
      if (failed(error)) return;
    }
  }
  clearTimeout(timer);
  timer = setTimeout(poll, POLL_SECONDS * 1000);
}

function show(stats) {
  const now = clock();
  history.add(stats, now);
  byId("key-form").hidden = byId("refused").hidden = true;
  byId("main").hidden = false;
  byId("forget").hidden = !sessionStorage.getItem(KEY);
  setText(byId("model"), stats.model);
  showModels(stats);
  connection(`Version ${stats.gateway.version}, up for ${seconds(stats.gateway.uptime_seconds)}`);
  showSummary(stats, history);
  showSources(stats, history, now);
  showReplicas(stats);
  showTransfers(stats, history);
  showNodes(stats, history);
  showTiers(stats);
  showTiersBelow(stats, history);
  showLedger(stats);
  showLimits(stats);
}

// Of several models one is shown; which, is chosen.
function showModels(stats) {
  const choice = byId("models");
  byId("models-label").hidden = stats.models.length < 2;
  if (stats.models.length < 2) return choice.replaceChildren();
  if (stats.models.join("\n") === [...choice.options].map(({ value }) => value).join("\n")) return;
  choice.replaceChildren(...stats.models.map((name) => new Option(name, name, false, name === stats.model)));
}

// Say what went wrong. Returns whether there is no use in asking again.
function failed(error) {
  if (error instanceof Refused && error.status === 401) {
    wantKey(sessionStorage.getItem(KEY) ? "That is not the admin key." : "");
    return true;
  }
  if (error instanceof Refused && error.status === 403) {
    byId("main").hidden = true;
    byId("refused").hidden = false;
    setText(byId("refused"), error.message);
    return true;
  }
  if (error instanceof Refused && error.status === 404 && byId("models").value) {
    // A gateway that was started again with other models: the first of them, from now on.
    byId("models").replaceChildren();
    history = new History();
    polls = 0;
  }
  connection(error instanceof Refused ? error.message : "The gateway does not answer. Figures are of when it last did.", true);
  return false;
}

function connection(words, isLost = false) {
  const place = byId("connection");
  // Read out when it changes in kind, not each time that the age does.
  place.setAttribute("aria-live", isLost !== place.classList.contains("lost") ? "polite" : "off");
  place.classList.toggle("lost", isLost);
  setText(place, words);
}

function wantKey(why) {
  sessionStorage.removeItem(KEY);
  byId("main").hidden = byId("forget").hidden = true;
  byId("key-form").hidden = false;
  setText(byId("key-error"), why);
  connection("The admin key is needed.");
  byId("key").value = "";
  byId("key").focus();
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) return wantKey("That is not the admin key.");
  sessionStorage.setItem(KEY, key);
  poll();
});

byId("forget").addEventListener("click", () => {
  clearTimeout(timer);
  wantKey("");
});

byId("models").addEventListener("change", () => {
  history = new History();
  polls = 0;
  poll();
});

byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  if (!paused) poll();
});

byId("explain-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const id = byId("request-id").value.trim();
  try {
    showExplanation(id, await ask(`/kv/explain/${encodeURIComponent(id)}`));
  } catch (error) {
    if (error instanceof Refused && error.status === 404) showExplanation(id, null);
    else failed(error);
  }
});

document.addEventListener("visibilitychange", () => document.hidden || poll());
poll();
