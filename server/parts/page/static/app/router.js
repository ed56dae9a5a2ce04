// Views have URLs in the fragment: #/requests/ID?name=value.
import { effect, signal } from "./lib.js";

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
/** The names of the views that there are. */
export const viewNames = signal(/** @type {string[]} */ ([]));
/** @type {Map<string, string>} */
const lastLinks = new Map(); // by view

effect(() => {
  lastLinks.set(route.value.view, linkTo(route.value.view, { id: route.value.id, params: Object.fromEntries(route.value.params) }));
});
addEventListener("hashchange", () => (route.value = read()));

/**
 * The link to what a view has shown last.
 * @param {string} view
 */
export const linkBack = (view) => lastLinks.get(view) ?? linkTo(view);

/**
 * Goes to a view; with `replace`, Back does not come back here.
 * @param {string} view
 * @param {{id?: string, params?: Record<string, string | number>, replace?: boolean}} [options]
 */
export function go(view, { replace = false, ...options } = {}) {
  if (!replace) location.hash = linkTo(view, options);
  else {
    history.replaceState(null, "", linkTo(view, options));
    route.value = read();
  }
}
