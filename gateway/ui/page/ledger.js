// The ledger by reason, the explanation of one request, and limits by tenant.

import { byId, element, fillTable } from "./elements.js";
import { count, inWords, percent, seconds, share } from "./words.js";

const REASONS = {
  none: "nothing was missed: all that any replica held was delivered",
  cold: "nobody had computed this prompt's beginning before",
  load: "its holder was busy, or importing would have taken longer than computing",
  promised: "another request was computing it, and was not done when this one began",
  stale: "the source was gone, or held less than when the request was planned",
  check_failed: "blocks changed while they were copied, or could not be copied",
  parity: "the gateway's token ids are not, or not known to be, the engine's",
  evicted: "its blocks had been given to others, or their replica ended",
  flushed: "caches had been emptied on request",
  off: "this request reads no cache, or its replica exchanges none",
  retried: "the replica was lost or refused, and it was tried elsewhere or failed",
  left: "the client left before the first token",
  unknown: "no known reason explains it, or the engine left no record",
};

export function showLedger(stats) {
  const { requests, lost_tokens: lost, settled } = stats.ledger;
  const rows = Object.keys(requests).filter((reason) => requests[reason]);
  rows.sort((a, b) => lost[b] - lost[a] || requests[b] - requests[a]);
  fillTable(
    byId("ledger"),
    [["Reason", "head"], ["Requests", "bar"], ["Tokens computed again", "number"], ["Meaning", "text"]],
    rows.map((reason) => {
      const part = share(requests[reason], settled);
      return [inWords(reason), { text: `${count(requests[reason])} (${percent(part)})`, share: part }, count(lost[reason]), REASONS[reason] ?? ""];
    }),
    "No request is finished yet.",
  );
}

// Show the attempts under a request id; null: the ledger knows none.
export function showExplanation(id, found) {
  const place = byId("explanation");
  if (!found || !found.attempts.length) {
    place.replaceChildren(element("p", `The ledger does not know ${id}, or no longer.`));
    return;
  }
  place.replaceChildren(...found.attempts.flatMap((attempt, number) => {
    const got = attempt.delivered[0];
    const lines = [
      `Attempt ${number + 1}: ${attempt.replica}, ${attempt.action}${attempt.source ? ` from ${attempt.source}` : ""}: ${attempt.why}`,
      `Prompt: ${count(attempt.prompt_tokens)} tokens; expected ${count(attempt.expected.local_tokens)} from its cache, ${count(attempt.expected.peer_tokens)} imported, first token in ${seconds(attempt.expected.first_token_seconds)}.`,
      got
        ? `Delivered: ${count(got.local_tokens)} from its cache, ${count(got.peer_tokens)} imported${got.source ? ` from ${got.source}` : ""}, ${count(got.computed_tokens)} computed${got.first_token_seconds === null ? "" : `; first token in ${seconds(got.first_token_seconds)}`}.`
        : "Delivered: nothing is known of it so far.",
      `Status ${attempt.status ?? "running"}. ${inWords(attempt.reason)}: ${attempt.reason_in_words}.`,
    ];
    return lines.map((line) => element("p", line));
  }));
}

const limitsOf = (key) => Object.entries(key.limits).map(([name, { limit, used }]) => `${inWords(name)} ${count(used)} of ${count(limit)}`);

// Tenants whose keys have limits: a row for a tenant, with those of its keys in words.
export function showLimits(stats) {
  const tenants = stats.limits ?? [];
  byId("limits-section").hidden = !tenants.length;
  fillTable(
    byId("limits"),
    [["Tenant", "head"], ["Requests", "number"], ["Computed", "number"], ["From caches", "number"], ["Generated", "number"], ["Charged", "number"], ["Refused", "text"], ["Keys", "text"]],
    tenants.map((tenant) => {
      const refused = Object.entries(tenant.refused).filter(([, number]) => number);
      return [
        tenant.tenant,
        count(tenant.requests),
        count(tenant.uncached_tokens),
        count(tenant.cached_tokens),
        count(tenant.generated_tokens),
        count(tenant.charged_tokens),
        { text: refused.map(([name, number]) => `${inWords(name)} ${count(number)}`).join(", ") || "–", kind: refused.length ? "warn" : "" },
        tenant.keys.map((key) => `${key.key}: ${[`${count(key.requests_in_flight)} requests now`, ...limitsOf(key)].join(", ")}`).join("; "),
      ];
    }),
    "",
  );
}
