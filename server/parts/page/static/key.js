// The API key: kept in this tab's session storage, and sent in a header only, never in a URL or a cookie.
const NAME = "lightwell-api-key";

let unsaved = /** @type {string | null} */ (null); // the key, where storage is blocked

/**
 * Whether a header can hold it.
 * @param {string} key
 */
export const isValidKey = (key) => /^[\x21-\x7e]+$/.test(key);
export const hasKey = () => read() !== null;
/** @param {string} key */
export function keepKey(key) {
  unsaved = key;
  attempt(() => sessionStorage.setItem(NAME, key));
}
export function forgetKey() {
  unsaved = null;
  attempt(() => sessionStorage.removeItem(NAME));
}
/** @returns {Record<string, string>} */
export const authorization = () => (hasKey() ? { Authorization: `Bearer ${read()}` } : {});

const read = () => attempt(() => sessionStorage.getItem(NAME)) ?? unsaved;

/**
 * Returns what a function returns, or null if it fails: storage may be blocked.
 * @template T
 * @param {() => T} use
 * @returns {T | null}
 */
function attempt(use) {
  try {
    return use();
  } catch {
    return null;
  }
}
