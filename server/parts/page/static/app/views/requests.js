// Requests: a table of them, and for one of them what happened to it.
import { html } from "../lib.js";
import { Detail } from "../requests/detail.js";
import { Table } from "../requests/table.js";
import { route } from "../router.js";

export const title = "Requests";
export const about =
  "What each request waited for and how long, from its arrival to its last token. This table shows no text of prompts or answers.";

export default function Requests() {
  const { id } = route.value;
  return html`<div class="requests">${id ? html`<${Detail} key=${id} id=${id} />` : html`<${Table} />`}</div>`;
}
