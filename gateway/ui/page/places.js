// Where KV is beside the replicas' own caches: host memory, disk and vault, and other nodes.

import { byId, fillTable, setText } from "./elements.js";
import { bytes, count, inWords, percent, seconds, share } from "./words.js";

export function showTiers(stats) {
  byId("tiers-section").hidden = !stats.host_memory.length;
  fillTable(
    byId("tiers"),
    [["Of", "head"], ["Stored", "bar"], ["Size", "number"], ["Restored blocks", "number"], ["Restored", "number"], ["Gave way", "number"], ["Lost", "number"]],
    stats.host_memory.map((tier) => {
      const used = share(tier.stored_blocks, tier.blocks);
      return [tier.replica, { text: `${percent(used)} of ${count(tier.blocks)}`, share: used }, bytes(tier.bytes), count(tier.import_blocks), bytes(tier.import_bytes), count(tier.evictions), count(tier.dropped_blocks)];
    }),
    "",
  );
}

// Counts above 0 in words.
const counted = (figures) => figures.filter(([number]) => number).map(([number, words]) => `${count(number)} ${words}`);

export function showTiersBelow(stats, history) {
  const below = stats.tiers;
  byId("below-section").hidden = !below.stores.length;
  fillTable(
    byId("below"),
    [["Store", "head"], ["State", ""], ["In use", "bar"], ["Blocks", "number"], ["Written", "number"], ["Written now", "number"], ["Read", "number"], ["Read now", "number"], ["While reading", "number"], ["Notes", "text"]],
    below.stores.map((store) => {
      const used = share(store.bytes, store.bytes_max), well = store.state === "ok";
      const written = history.stored(store), read = history.found(store);
      const trouble = counted([[store.dropped_frames, "not written"], [store.damaged_frames, "damaged"], [store.errors, "failed operations"]]);
      const usual = counted([[store.missed_frames, "not found"], [store.evicted_frames, "gave way"], [store.expired_frames, "became too old"]]);
      return [
        store.name,
        well ? { text: "✓ ok", kind: "good" } : { text: "! failing", kind: "bad" },
        store.bytes_max ? { text: `${percent(used)} of ${bytes(store.bytes_max)}`, share: used } : bytes(store.bytes),
        count(store.frames),
        bytes(store.stored_bytes),
        written ? { text: `${bytes(written)}/s`, kind: "good" } : "–",
        bytes(store.found_bytes),
        read ? { text: `${bytes(read)}/s`, kind: "good" } : "–",
        store.read_seconds ? `${bytes(store.found_bytes / store.read_seconds)}/s` : "–",
        { text: [...(well ? [] : [store.state]), ...trouble, ...usual].join(", "), kind: well && !trouble.length ? "" : "warn" },
      ];
    }),
    "",
  );
  const told = [
    `Brought up for ${count(below.promotions)} prompts, late for ${count(below.promotions_late)} of them.`,
    `Replicas imported ${count(below.import_blocks)} blocks of these; ${count(below.import_failures)} imports fell short.`,
    below.lost_blocks ? `${count(below.lost_blocks)} blocks gave way in host memory before they were written.` : "",
  ];
  setText(byId("below-more"), told.filter(Boolean).join(" "));
}

export function showNodes(stats, history) {
  byId("nodes-section").hidden = !stats.nodes.length;
  fillTable(
    byId("nodes"),
    [["Node", "head"], ["State", ""], ["By", ""], ["Measured", "number"], ["Now", "number"], ["Fetches", "number"], ["Blocks", "number"], ["Bytes", "number"], ["A fetch took", "number"], ["Did not come", "text"]],
    stats.nodes.map((node) => {
      const rate = history.fetched(node);
      const measured = node.transport === "nixl" ? node.nixl_bytes_per_second : node.tcp_bytes_per_second;
      const failed = Object.entries(node.failed_blocks).filter(([, blocks]) => blocks);
      return [
        node.name,
        node.trouble ? { text: `✕ not heard: ${node.trouble}`, kind: "bad wrapped" } : { text: "✓ heard", kind: "good" },
        node.transport ? { text: node.transport.toUpperCase() } : "–",
        measured ? `${bytes(measured)}/s` : "–",
        rate ? { text: `${bytes(rate)}/s`, kind: "good" } : "–",
        count(node.fetches),
        count(node.fetched_blocks),
        bytes(node.fetched_bytes),
        node.fetches ? seconds(node.fetch_seconds / node.fetches) : "–",
        { text: failed.map(([why, blocks]) => `${inWords(why)} ${count(blocks)}`).join(", ") || "–", kind: failed.length ? "warn" : "" },
      ];
    }),
    "",
  );
}
