// The sections of the page: each puts a part of the figures into its place.

import { byId, element, fillTable, setText, svg } from "./elements.js";
import { COLUMNS, SOURCES } from "./history.js";
import { ago, bytes, count, inWords, percent, seconds, share } from "./words.js";

const TRANSFERS_SHOWN = 24;
const HOLDERS_SHOWN = 8;

const hitShare = (tokens) => share(tokens.prompt - tokens.computed, tokens.prompt);

export function showSummary(stats, history) {
  const { totals } = stats;
  const pulls = stats.replicas.flatMap((replica) => replica.peers.map((peer) => history.rate(replica, peer)));
  const figures = [
    ["Replicas ready", `${totals.ready} of ${totals.replicas}`],
    ["Requests now", count(stats.gateway.in_flight)],
    ["Prompt tokens a second", count(history.tokensPerSecond())],
    ["From caches so far", totals.tokens.prompt ? percent(hitShare(totals.tokens)) : "–"],
    ["Caches in use", totals.blocks ? percent(share(totals.cached_blocks, totals.blocks)) : "–"],
    ["Imported a second", bytes(pulls.reduce((sum, rate) => sum + rate, 0))],
  ];
  const list = byId("summary");
  figures.forEach(([name, value], place) => {
    const tile = list.children[place] ?? list.appendChild(element("div"));
    if (!tile.children.length) tile.append(element("dt", name), element("dd"));
    setText(tile.lastChild, value);
  });
}

export function showSources(stats, history, now) {
  const sums = history.sums(), all = sums.reduce((sum, n) => sum + n, 0);
  const legend = byId("sources-legend");
  SOURCES.forEach(([name, words], i) => {
    const entry = legend.children[i] ?? legend.appendChild(element("span"));
    if (!entry.children.length) entry.append(element("span", "", `swatch ${name}`), element("span"));
    setText(entry.lastChild, all ? `${words} ${percent(share(sums[i], all))}` : words);
  });
  const told = SOURCES.map(([, words], i) => `${words} ${percent(share(sums[i], all))}`).join(", ");
  const label = all ? `Prompt tokens since this page was opened: ${told}` : "No prompts since this page was opened";
  const chart = svg("svg", { class: "chart", viewBox: `0 0 ${COLUMNS} 100`, preserveAspectRatio: "none", role: "img", "aria-label": label });
  history.columns(now).forEach((column, place) => {
    const height = (column ?? []).reduce((sum, n) => sum + n, 0);
    let top = 100;
    if (height) column.forEach((tokens, i) => {
      const part = (tokens / height) * 100;
      top -= part;
      chart.append(svg("rect", { class: SOURCES[i][0], x: place + 0.06, y: top, width: 0.88, height: part }));
    });
  });
  byId("sources-chart").replaceChildren(chart);
  const { tokens } = stats.totals;
  fillTable(
    byId("sources-table"),
    [["Source", "head"], ["Since this page was opened", "number"], ["Since the gateway's start", "number"], ["Share of that", "bar"]],
    SOURCES.map(([, words, read], i) => {
      const part = share(read(tokens), tokens.prompt);
      return [words, count(sums[i]), count(read(tokens)), { text: percent(part), share: part }];
    }),
    "",
  );
}

function stateOf(replica) {
  const well = replica.standing === "well";
  if (replica.state === "ready" && well) return { text: "✓ ready", kind: "good" };
  if (replica.state === "ready") return { text: `! ${replica.standing}`, kind: "bad" };
  const bad = replica.state === "failed" || replica.state === "backoff";
  return { text: bad ? `✕ ${replica.state}` : `… ${replica.state}`, kind: bad ? "bad" : "warn" };
}

function notesOn(replica) {
  const notes = [replica.reason, replica.standing_reason];
  if (replica.exchanges !== "ok") notes.push(`exchanges no KV: ${replica.exchanges}`);
  const others = Object.entries(replica.incompatible);
  if (others.length) notes.push(`cannot import from ${others.map(([name]) => name).join(", ")}: ${others[0][1].join(", ")}`);
  if (replica.restarts) notes.push(`restarts: ${replica.restarts}`);
  return notes.filter(Boolean).join("; ");
}

export function showReplicas(stats) {
  fillTable(
    byId("replicas"),
    [["Replica", "head"], ["State", ""], ["Device", ""], ["Requests", "number"], ["Waiting", "number"], ["Decoding", "number"], ["Cache in use", "bar"], ["From caches", "bar"], ["Notes", "text"]],
    stats.replicas.map((replica) => {
      const used = share(replica.cached_blocks, replica.blocks), hit = hitShare(replica.tokens);
      return [
        replica.name,
        stateOf(replica),
        replica.device,
        count(replica.in_flight),
        count(replica.load.waiting_requests),
        count(replica.load.decoding_requests),
        replica.blocks ? { text: `${percent(used)} of ${count(replica.blocks)}`, share: used } : "–",
        replica.tokens.prompt ? { text: percent(hit), share: hit } : "–",
        notesOn(replica),
      ];
    }),
    "There are no replicas yet. They appear here as soon as they start.",
  );
}

export function showTransfers(stats, history) {
  const pairs = stats.replicas.flatMap((replica) => replica.peers.map((peer) => ({ replica, peer, rate: history.rate(replica, peer) })));
  pairs.sort((a, b) => b.rate - a.rate || b.peer.bytes - a.peer.bytes);
  fillTable(
    byId("transfers"),
    [["From", "head"], ["To", ""], ["By", ""], ["Now", "number"], ["Imports", "number"], ["Blocks", "number"], ["Bytes", "number"], ["While copying", "number"], ["Fell short", "number"]],
    pairs.slice(0, TRANSFERS_SHOWN).map(({ replica, peer, rate }) => [
      peer.name,
      replica.name,
      inWords(peer.transport),
      rate ? { text: `${bytes(rate)}/s`, kind: "good" } : "–",
      count(peer.imports),
      count(peer.blocks),
      bytes(peer.bytes),
      peer.seconds ? `${bytes(peer.bytes / peer.seconds)}/s` : "–",
      { text: count(peer.failures), kind: peer.failures ? "warn" : "" },
    ]),
    "No replica has imported from another one yet.",
  );
  const more = pairs.length - TRANSFERS_SHOWN;
  setText(byId("transfers-more"), more > 0 ? `${more} more pairs transferred less.` : "");
}

function names(list) {
  const shown = list.slice(0, HOLDERS_SHOWN).join(", ");
  return list.length > HOLDERS_SHOWN ? `${shown} and ${list.length - HOLDERS_SHOWN} more` : shown || "nobody";
}

export function showPrefixes(report) {
  fillTable(
    byId("prefixes"),
    [["Prefix", "key"], ["Tokens", "number"], ["Requests", "number"], ["Last", "number"], ["Held by", "text"]],
    report.prefixes.map((prefix) => [prefix.key.slice(0, 12), count(prefix.tokens), count(prefix.requests), ago(prefix.last_used), names(prefix.holders)]),
    "No prefix has been asked for yet.",
  );
  fillTable(
    byId("kept"),
    [["Prefix", "key"], ["Tenant", ""], ["Tokens", "number"], ["Kept for", "number"], ["Kept by", "text"]],
    report.kept.map(keptRow),
    "None. POST /kv/prefixes, or peerkv kv pin, keeps a prefix in the caches.",
  );
}

function keptRow(kept) {
  const places = kept.places.map((place) => `${place.replica} (${place.reason ? `${place.state}: ${place.reason}` : place.state})`);
  const left = kept.expires - Date.now() / 1000;
  const until = kept.renew ? "always" : left > 0 ? seconds(left) : "over";
  return [kept.id, kept.tenant || "–", count(kept.tokens), until, names(places)];
}
