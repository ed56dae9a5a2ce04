// The settings of a conversation: system prompt, sampling, tools, format of the answer.
import { Button, Field, Select, Slider } from "../components.js";
import { html } from "../lib.js";
import { model, modelInfo, modelOptions, models } from "../state.js";
import { GROUPS } from "./parameters.js";
import { jsonProblem } from "./request.js";
import { NO_SETTINGS } from "./settings_store.js";
import { changeSettings, settings } from "./store.js";

const FORMATS = /** @type {[string, string][]} */ ([["text", "Any text"], ["json_object", "Any JSON object"], ["json_schema", "JSON that matches a schema"]]);
const CHOICES = /** @type {[string, string][]} */ ([["auto", "The model decides"], ["required", "It must call one"], ["none", "It must not call any"]]);
const EXAMPLE_TOOLS = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city now",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];
const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { name: { type: "string" }, age: { type: "integer" } },
  required: ["name", "age"],
};

export function SettingsPanel() {
  const { system, tools, toolChoice, format, schema, other } = settings.value;
  const isReasoning = Boolean(modelInfo.value?.reasoning_format);
  return html`
    <div class="setting-groups">
      ${models.value.length > 1 && html`
        <${Select} label="Model" value=${model.value} options=${modelOptions.value} onChange=${(/** @type {string} */ id) => (model.value = id)} />
      `}
      <${Text} label="System prompt" value=${system} rows=${4} hint="What the model is told before the conversation: its role, its tone, what it must know."
        onInput=${(/** @type {string} */ text) => changeSettings({ system: text })} />
      ${GROUPS.filter(({ needsReasoning }) => isReasoning || !needsReasoning).map((group) => html`<${Group} key=${group.title} ...${group} />`)}
      <details>
        <summary>Tools</summary>
        <${Text} label="Functions that the model may call" isCode value=${tools} rows=${6} problem=${jsonProblem("This", tools)}
          hint="A JSON array, as in the API. When the model calls one, you enter its result." onInput=${(/** @type {string} */ text) => changeSettings({ tools: text })} />
        ${!tools.trim() && html`<${Button} onClick=${() => changeSettings({ tools: JSON.stringify(EXAMPLE_TOOLS, null, 2) })}>Insert an example<//>`}
        <${Select} label="Choice" value=${toolChoice} options=${CHOICES} onChange=${(/** @type {string} */ choice) => changeSettings({ toolChoice: choice })} />
      </details>
      <details>
        <summary>Format of the answer</summary>
        <${Select} label="Format" value=${format} options=${FORMATS} hint="Tokens that would break the format are never chosen, so the answer always matches."
          onChange=${(/** @type {any} */ choice) => changeSettings({ format: choice, schema: schema.trim() ? schema : JSON.stringify(EXAMPLE_SCHEMA, null, 2) })} />
        ${format === "json_schema" && html`
          <${Text} label="JSON schema" isCode value=${schema} rows=${8} problem=${jsonProblem("This", schema)} onInput=${(/** @type {string} */ text) => changeSettings({ schema: text })} />
        `}
      </details>
      <details>
        <summary>Other parameters</summary>
        <${Text} label="JSON" isCode value=${other} rows=${4} problem=${jsonProblem("This", other)}
          hint=${'Any parameter of the API: {"structured_outputs": {"regex": "[a-z]+"}}. These come last, so they replace what is set above.'}
          onInput=${(/** @type {string} */ text) => changeSettings({ other: text })} />
      </details>
      <${Button} icon="refresh" onClick=${() => changeSettings(NO_SETTINGS)}>Reset all settings<//>
      <p class="hint">They hold for this conversation; a new one begins with them too.</p>
    </div>
  `;
}

/** @param {{title: string, isOpen?: boolean, parameters: import("./parameters.js").Parameter[]}} props */
const Group = ({ title, isOpen = false, parameters }) => html`
  <details open=${isOpen}>
    <summary>${title}</summary>
    ${parameters.map((parameter) => html`<${Control} key=${parameter.name} parameter=${parameter} />`)}
  </details>
`;

/** @param {{parameter: import("./parameters.js").Parameter}} props */
function Control({ parameter }) {
  const { name, label, kind, hint } = parameter;
  const value = settings.value.parameters[name] ?? null;
  const fallback = modelInfo.value?.default_sampling?.[name] ?? parameter.fallback;
  const set = (/** @type {any} */ changed) => {
    const { [name]: _, ...others } = settings.value.parameters;
    changeSettings({ parameters: changed === null ? others : { ...others, [name]: changed } });
  };
  if (kind === "slider") return html`<${Slider} ...${parameter} value=${value} fallback=${fallback} onInput=${set} />`;
  if (kind === "switch") return html`<${Switch} label=${label} hint=${hint} isOn=${value === true} onChange=${(/** @type {boolean} */ isOn) => set(isOn || null)} />`;
  if (kind === "choice") {
    const options = [["", "As the model does"], ...(parameter.options ?? []).map((option) => [option, option])];
    return html`<${Select} label=${label} hint=${hint} value=${value ?? ""} options=${options} onChange=${(/** @type {string} */ choice) => set(choice || null)} />`;
  }
  if (kind === "lines") {
    const read = (/** @type {string} */ text) => set(text === "" ? null : text.split("\n"));
    return html`<${Text} label=${label} hint=${hint} rows=${2} value=${[value ?? []].flat().join("\n")} onInput=${read} />`;
  }
  if (kind === "json") return html`<${JsonText} label=${label} hint=${hint} value=${value} onInput=${set} />`;
  const read = (/** @type {any} */ event) => set(event.target.value === "" ? null : Number(event.target.value));
  return html`
    <${Field} label=${label} hint=${hint}>
      ${(/** @type {any} */ attributes) => html`
        <input type="number" ...${attributes} min=${parameter.min} step="1" value=${value ?? ""} placeholder=${fallback} onChange=${read} />
      `}
    <//>
  `;
}

/** @param {{label: string, hint: string, isOn: boolean, onChange: (isOn: boolean) => void}} props */
const Switch = ({ label, hint, isOn, onChange }) => html`
  <div class="field switch">
    <label><input type="checkbox" checked=${isOn} onChange=${(/** @type {any} */ event) => onChange(event.target.checked)} /> ${label}</label>
    <p class="hint">${hint}</p>
  </div>
`;

/**
 * @param {{label: string, value: string, rows: number, hint?: any, problem?: string, isCode?: boolean, onInput: (text: string) => void}} props
 */
const Text = ({ label, value, rows, hint, problem, isCode = false, onInput }) => html`
  <${Field} label=${label} hint=${problem ? html`<span class="error">${problem}</span>` : hint}>
    ${(/** @type {any} */ attributes) => html`
      <textarea ...${attributes} rows=${rows} class=${isCode ? "mono" : ""} spellcheck=${!isCode} aria-invalid=${problem ? "true" : undefined} value=${value}
        onInput=${(/** @type {any} */ event) => onInput(event.target.value)}></textarea>
    `}
  <//>
`;

/**
 * A value that is written as JSON; while it cannot be read, the server gets the text, and says so.
 * @param {{label: string, hint: string, value: any, onInput: (value: any) => void}} props
 */
function JsonText({ label, hint, value, onInput }) {
  const text = value === null ? "" : typeof value === "string" ? value : JSON.stringify(value);
  const read = (/** @type {string} */ typed) => {
    const isReadable = typed.trim() !== "" && jsonProblem("This", typed) === "";
    onInput(isReadable ? JSON.parse(typed) : typed || null);
  };
  return html`<${Text} label=${label} hint=${hint} isCode rows=${2} value=${text} problem=${typeof value === "string" ? jsonProblem("This", text) : ""} onInput=${read} />`;
}

/** What differs from the defaults, in words. */
export function settingsSummary() {
  const { system, parameters, tools, format } = settings.value;
  const parts = Object.entries(parameters).map(([name, value]) => `${name} ${typeof value === "object" ? "…" : value}`);
  if (system.trim()) parts.unshift("system prompt");
  if (tools.trim()) parts.push("tools");
  if (format !== "text") parts.push(format === "json_schema" ? "JSON schema" : "JSON");
  return parts;
}
