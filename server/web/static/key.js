// The API key: kept in this tab's session storage, and sent in a header only, never in a URL or a cookie.
const NAME = "lightwell-api-key";

// What a header can hold.
export const isValidKey = (key) => /^[\x21-\x7e]+$/.test(key);
export const hasKey = () => sessionStorage.getItem(NAME) !== null;
export const keepKey = (key) => sessionStorage.setItem(NAME, key);
export const forgetKey = () => sessionStorage.removeItem(NAME);
export const authorization = () => (hasKey() ? { Authorization: `Bearer ${sessionStorage.getItem(NAME)}` } : {});
