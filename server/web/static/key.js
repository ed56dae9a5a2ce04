// The API key: kept in this tab's session storage, and sent in a header only, never in a URL or a cookie.
const NAME = "lightwell-api-key";

/**
 * Whether a header can hold it.
 * @param {string} key
 */
export const isValidKey = (key) => /^[\x21-\x7e]+$/.test(key);
export const hasKey = () => sessionStorage.getItem(NAME) !== null;
/** @param {string} key */
export const keepKey = (key) => sessionStorage.setItem(NAME, key);
export const forgetKey = () => sessionStorage.removeItem(NAME);
/** @returns {Record<string, string>} */
export const authorization = () => (hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(NAME)}` } : {});
