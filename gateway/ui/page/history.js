// What changed since this page was opened: tokens by source over time, and the rates of transfers.

export const SOURCES = [
  ["local", "own cache", (tokens) => tokens.local],
  ["peer", "other replicas", (tokens) => tokens.peer_shared_memory + tokens.peer_cuda_ipc],
  ["memory", "tiers", (tokens) => tokens.host_memory + tokens.disk + tokens.vault],
  ["computed", "computed", (tokens) => tokens.computed],
];
export const COLUMN_SECONDS = 10;
export const COLUMNS = 60;
const RATE_SECONDS = 10;

const tokensOf = (stats) => SOURCES.map(([, , read]) => read(stats.totals.tokens));
const pairKey = (replica, peer) => JSON.stringify([replica.name, peer.name, peer.transport]);
const storeKey = (store, what) => JSON.stringify(["store", store.name, what]);
const nodeKey = (node) => JSON.stringify(["node", node.name]);

export class History {
  #columns = new Map(); // by number, in units of COLUMN_SECONDS
  #tokens = null;
  #requests = 0;
  #samples = []; // of bytes by pair, store and node, the oldest about RATE_SECONDS old

  // Take in the figures of `now`, in seconds of one clock. Counts that fall mean another gateway: all begins anew.
  add(stats, now) {
    const tokens = tokensOf(stats);
    if (this.#tokens && (tokens.some((n, i) => n < this.#tokens[i]) || stats.gateway.requests < this.#requests)) {
      this.#columns.clear();
      this.#samples = [];
      this.#tokens = null;
    }
    const number = Math.floor(now / COLUMN_SECONDS);
    const column = this.#columns.get(number) ?? SOURCES.map(() => 0);
    if (this.#tokens) tokens.forEach((n, i) => (column[i] += n - this.#tokens[i]));
    this.#columns.set(number, column);
    for (const old of this.#columns.keys()) if (old <= number - COLUMNS) this.#columns.delete(old);
    this.#tokens = tokens;
    this.#requests = stats.gateway.requests;
    const moved = new Map();
    for (const replica of stats.replicas) for (const peer of replica.peers) moved.set(pairKey(replica, peer), peer.bytes);
    for (const store of stats.tiers.stores) moved.set(storeKey(store, "in"), store.stored_bytes).set(storeKey(store, "out"), store.found_bytes);
    for (const node of stats.nodes) moved.set(nodeKey(node), node.fetched_bytes);
    this.#samples.push([now, moved, tokens]);
    while (this.#samples.length > 2 && now - this.#samples[1][0] >= RATE_SECONDS) this.#samples.shift();
  }

  // The columns' tokens by source, the newest last; null where nothing is known.
  columns(now) {
    const last = Math.floor(now / COLUMN_SECONDS);
    return Array.from({ length: COLUMNS }, (_, place) => this.#columns.get(last - COLUMNS + 1 + place) ?? null);
  }

  // Tokens by source in all columns.
  sums() {
    return SOURCES.map((_, i) => [...this.#columns.values()].reduce((sum, column) => sum + column[i], 0));
  }

  // Bytes per second that a replica imports from a peer now.
  rate(replica, peer) {
    return this.#moved(pairKey(replica, peer));
  }

  // Bytes per second that a store takes, and gives, and that come from another node.
  stored(store) {
    return this.#moved(storeKey(store, "in"));
  }

  found(store) {
    return this.#moved(storeKey(store, "out"));
  }

  fetched(node) {
    return this.#moved(nodeKey(node));
  }

  #moved(key) {
    return this.#perSecond((sample) => sample[1].get(key) ?? 0);
  }

  tokensPerSecond() {
    return this.#perSecond((sample) => sample[2].reduce((sum, n) => sum + n, 0));
  }

  #perSecond(read) {
    const first = this.#samples[0], last = this.#samples.at(-1);
    if (!first || last[0] <= first[0]) return 0;
    return Math.max(0, read(last) - read(first)) / (last[0] - first[0]);
  }
}
