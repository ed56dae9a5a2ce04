// Small parts that the views share.
import { html, useEffect, useId, useMemo, useRef, useState } from "./lib.js";

/**
 * Paths of icons on a grid of 24, drawn as lines.
 * @type {Record<string, string>}
 */
const ICONS = {
  attach: "M20 11l-8.5 8.5a5 5 0 0 1-7-7L13 4a3.4 3.4 0 0 1 4.8 4.8L9.4 17.2a1.7 1.7 0 0 1-2.4-2.4L15 7",
  check: "M5 13l4 4L19 7",
  close: "M6 6l12 12M18 6L6 18",
  code: "M9 7l-5 5 5 5M15 7l5 5-5 5",
  copy: "M9 9h10v11H9zM5 15V4h10",
  download: "M12 4v11m0 0l-4-4m4 4l4-4M5 20h14",
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  left: "M15 5l-7 7 7 7",
  menu: "M4 7h16M4 12h16M4 17h16",
  refresh: "M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7",
  right: "M9 5l7 7-7 7",
  send: "M12 20V5m0 0l-6 6m6-6l6 6",
  settings: "M4 7h9m5 0h2M4 17h2m5 0h9M13 7a2.5 2.5 0 1 0 5 0 2.5 2.5 0 1 0-5 0M6 17a2.5 2.5 0 1 0 5 0 2.5 2.5 0 1 0-5 0",
  stop: "M7 7h10v10H7z",
  upload: "M12 16V5m0 0l-4 4m4-4l4 4M5 20h14",
  trash: "M5 7h14M10 7V4h4v3m-7 0l1 13h8l1-13",
};

/** @param {{name: string}} props */
export const Icon = ({ name }) => html`
  <svg class="icon" viewBox="0 0 24 24" width="20" height="20" aria-hidden="true"><path d=${ICONS[name]} fill=${name === "stop" ? "currentColor" : undefined} /></svg>
`;

/**
 * A button. One with an icon and no children is named by its label.
 * @param {{label?: string, icon?: string, kind?: "primary" | "quiet" | "danger", children?: any, [attribute: string]: any}} props
 */
export function Button({ label, icon, kind, children, class: extra = "", ...rest }) {
  const isSquare = icon && !children;
  return html`
    <button type="button" class="button ${kind ?? ""} ${isSquare ? "square" : ""} ${extra}" aria-label=${isSquare ? label : undefined}
      title=${isSquare ? label : undefined} ...${rest}>
      ${icon && html`<${Icon} name=${icon} />`}${children ?? (isSquare ? null : label)}
    </button>
  `;
}

/**
 * A label, one control, and what it does. The control is made by a function that gets the attributes it needs.
 * @param {{label: string, hint?: any, children: (attributes: {id: string, "aria-describedby"?: string}) => any}} props
 */
export function Field({ label, hint, children }) {
  const id = useId();
  return html`
    <div class="field">
      <label for=${id}>${label}</label>
      ${children({ id, "aria-describedby": hint ? `${id}-hint` : undefined })}
      ${hint && html`<p class="hint" id="${id}-hint">${hint}</p>`}
    </div>
  `;
}

/**
 * A slider with a box for the exact value. `null`, an empty box, is the default, which `fallback` tells.
 * @param {{label: string, hint?: any, value: number | null, min: number, max: number, step?: number, fallback?: number,
 *   onInput: (value: number | null) => void}} props
 */
export function Slider({ label, hint, value, min, max, step = 1, fallback, onInput }) {
  const read = (/** @type {any} */ event) => onInput(event.target.value === "" ? null : Number(event.target.value));
  return html`
    <${Field} label=${label} hint=${hint}>
      ${(/** @type {any} */ attributes) => html`
        <div class="slider">
          <input type="range" ...${attributes} min=${min} max=${max} step=${step} value=${value ?? fallback ?? min} onInput=${read} />
          <input type="number" aria-label="${label}, exact" step=${step} value=${value ?? ""} placeholder=${fallback ?? "auto"} onChange=${read} />
        </div>
      `}
    <//>
  `;
}

/**
 * @param {{label: string, hint?: any, value: string, options: (string | [string, string])[], onChange: (value: string) => void}} props
 */
export const Select = ({ label, hint, value, options, onChange }) => html`
  <${Field} label=${label} hint=${hint}>
    ${(/** @type {any} */ attributes) => html`
      <select ...${attributes} value=${value} onChange=${(/** @type {any} */ event) => onChange(event.target.value)}>
        ${options.map((option) => {
          const [key, text] = Array.isArray(option) ? option : [option, option];
          return html`<option value=${key} selected=${key === value}>${text}</option>`;
        })}
      </select>
    `}
  <//>
`;

/**
 * What is shown where there is nothing yet.
 * @param {{title: string, children?: any}} props
 */
export const Empty = ({ title, children }) => html`
  <div class="empty"><p class="empty-title">${title}</p>${children && html`<p>${children}</p>`}</div>
`;

/**
 * An error, and a button to try again.
 * @param {{error: {message: string} | string, onRetry?: () => void}} props
 */
export const Problem = ({ error, onRetry }) => html`
  <div class="problem" role="alert">
    <p>${typeof error === "string" ? error : error.message}</p>
    ${onRetry && html`<${Button} icon="refresh" onClick=${onRetry}>Try again<//>`}
  </div>
`;

/**
 * A button that copies a text. Pages that browsers do not trust have no clipboard: then there is no button.
 * @param {{text: string | (() => string), label?: string, children?: any}} props
 */
export function Copy({ text, label = "Copy", children }) {
  const [isCopied, setCopied] = useState(false);
  useEffect(() => {
    if (!isCopied) return undefined;
    const timer = setTimeout(() => setCopied(false), 2000);
    return () => clearTimeout(timer);
  }, [isCopied]);
  if (!navigator.clipboard) return null;
  const copy = () => navigator.clipboard.writeText(typeof text === "string" ? text : text()).then(() => setCopied(true));
  return html`
    <${Button} kind="quiet" icon=${isCopied ? "check" : "copy"} label=${isCopied ? "Copied" : label} onClick=${copy}>${children}<//>
  `;
}

/**
 * A button that opens files.
 * @param {{label: string, icon: string, accept?: string, children?: any, onOpen: (files: File[]) => void}} props
 */
export function OpenFiles({ label, icon, accept, children, onOpen }) {
  const ref = useRef(/** @type {HTMLInputElement | null} */ (null));
  const open = (/** @type {any} */ event) => {
    onOpen([...event.target.files]);
    event.target.value = ""; // so that the same file can be opened again
  };
  return html`
    <input ref=${ref} type="file" multiple hidden accept=${accept} aria-label=${label} onChange=${open} />
    <${Button} kind="quiet" icon=${icon} label=${label} onClick=${() => ref.current?.click()}>${children}<//>
  `;
}

/**
 * Saves something as a file.
 * @param {Blob} blob
 * @param {string} name of the file
 */
export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

/**
 * A dialog over the page. Escape and a click beside it close it, and the focus returns to where it was.
 * @param {{title: string, onClose: () => void, children: any, class?: string}} props
 */
export function Dialog({ title, onClose, children, class: extra = "" }) {
  const ref = useRef(/** @type {HTMLDialogElement | null} */ (null));
  const id = useId();
  useEffect(() => {
    const before = /** @type {HTMLElement | null} */ (document.activeElement);
    ref.current?.showModal();
    return () => before?.focus({ preventScroll: true }); // browsers do so only for one that is closed before it is removed
  }, []);
  const closeBeside = (/** @type {any} */ event) => event.target === ref.current && onClose();
  return html`
    <dialog ref=${ref} class="dialog ${extra}" aria-labelledby=${id} onClose=${onClose} onClick=${closeBeside}>
      <div class="dialog-body">
        <header><h2 id=${id}>${title}</h2><${Button} kind="quiet" icon="close" label="Close" onClick=${onClose} /></header>
        ${children}
      </div>
    </dialog>
  `;
}

/**
 * Whether a media query holds now.
 * @param {string} query
 */
export function useMedia(query) {
  const list = useMemo(() => matchMedia(query), [query]);
  const [matches, setMatches] = useState(list.matches);
  useEffect(() => {
    const change = () => setMatches(list.matches);
    list.addEventListener("change", change);
    return () => list.removeEventListener("change", change);
  }, [list]);
  return matches;
}
