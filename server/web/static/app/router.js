// Views have URLs in the fragment: #/requests/ID?name=value.
import { signal } from "./lib.js";

/** @typedef {{view: string, id: string, params: URLSearchParams}} Route */

/** @returns {Route} */
function read() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const [view = "", ...rest] = path.split("/");
  return { view: view || "chat", id: decode(rest.join("/")), params: new URLSearchParams(query) };
}

/** @param {string} text */
function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/**
 * The link to a view.
 * @param {string} view
 * @param {{id?: string, params?: Record<string, string | number>}} [options]
 */
export function linkTo(view, { id = "", params = {} } = {}) {
  const entries = Object.entries(params).map(([name, value]) => [name, String(value)]);
  const query = new URLSearchParams(entries).toString();
  return `#/${view}${id ? `/${encodeURIComponent(id)}` : ""}${query ? `?${query}` : ""}`;
}

export const route = signal(read());
addEventListener("hashchange", () => (route.value = read()));

/**
 * Goes to a view.
 * @param {string} view
 * @param {{id?: string, params?: Record<string, string | number>}} [options]
 */
export function go(view, options) {
  location.hash = linkTo(view, options);
}
