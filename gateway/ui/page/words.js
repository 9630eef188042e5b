// Figures in words.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export const count = (number) => (number < 100000 ? whole.format(number) : short.format(number));
export const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
export const share = (part, all) => (all ? part / all : 0);

export function bytes(number) {
  let unit = 0;
  for (; number >= 1024 && unit < UNITS.length - 1; unit += 1) number /= 1024;
  return `${number.toFixed(unit && number < 10 ? 1 : 0)} ${UNITS[unit]}`;
}

export function seconds(number) {
  if (number < 1) return `${(number * 1000).toFixed(number < 0.01 ? 1 : 0)} ms`;
  if (number < 120) return `${number.toFixed(number < 10 ? 1 : 0)} s`;
  if (number < 7200) return `${Math.round(number / 60)} min`;
  if (number < 172800) return `${Math.round(number / 3600)} h`;
  return `${Math.round(number / 86400)} d`;
}

export function ago(unixSeconds) {
  const passed = Date.now() / 1000 - unixSeconds;
  return passed < 1 ? "now" : `${seconds(passed)} ago`;
}

export const inWords = (name) => name.replaceAll("_", " ");
