// The parameters of a request that have a control, by group, in the order in which the server applies them.

import { SAMPLING } from "./sampling_parameters.js";

/**
 * @typedef {object} Parameter
 * @property {string} name as in the API
 * @property {string} label
 * @property {"slider" | "number" | "switch" | "choice" | "lines" | "json"} kind
 * @property {string} hint what it does
 * @property {number} [min]
 * @property {number} [max]
 * @property {number} [step]
 * @property {number | string} [fallback] what the server takes without it
 * @property {string[]} [options]
 */

/** @type {{title: string, isOpen?: boolean, needsReasoning?: boolean, parameters: Parameter[]}[]} */
export const GROUPS = [
  {
    title: "Chance",
    isOpen: true,
    parameters: [
      ...SAMPLING["Chance"],
      {
        name: "seed", label: "Seed", kind: "number", fallback: "random",
        hint: "The same request with the same seed gets the same answer, unless the server runs with --no-batch-invariant: then other requests may change it. Empty: a new one each time.",
      },
    ],
  },
  {
    title: "Length and end",
    isOpen: true,
    parameters: [
      {
        name: "max_completion_tokens", label: "Maximum of tokens", kind: "number", min: 1, fallback: "rest of the context",
        hint: "The answer is cut after this many tokens. Empty: it may fill the rest of the context.",
      },
      { name: "min_tokens", label: "Minimum of tokens", kind: "number", min: 0, fallback: 0, hint: "Nothing ends the answer before it has this many tokens." },
      { name: "stop", label: "Stop texts", kind: "lines", hint: "One a line. The answer ends where one of them appears, and leaves it out." },
      { name: "ignore_eos", label: "Go on after the end", kind: "switch", hint: "The model's token for the end does not end the answer; only the maximum does." },
    ],
  },
  {
    title: "Which tokens may be chosen",
    parameters: SAMPLING["Which tokens may be chosen"],
  },
  {
    title: "Repetition",
    parameters: SAMPLING["Repetition"],
  },
  {
    title: "Mirostat",
    parameters: SAMPLING["Mirostat"],
  },
  {
    title: "Words and order",
    parameters: [
      { name: "bad_words", label: "Forbidden words", kind: "lines", hint: "One a line. They cannot appear in the answer." },
      { name: "logit_bias", label: "Logit bias", kind: "json", hint: 'Added to the logits of single tokens, from -100 (never) to 100 (always), by token id: {"42": -5}.' },
      ...SAMPLING["Words and order"],
    ],
  },
  {
    title: "Thinking",
    needsReasoning: true,
    parameters: [
      {
        name: "reasoning_effort", label: "Effort", kind: "choice", options: ["none", "minimal", "low", "medium", "high", "xhigh", "max"],
        hint: "How much the model thinks before it answers, if its template has such a switch.",
      },
      { name: "thinking_token_budget", label: "Budget", kind: "number", min: -1, fallback: -1, hint: "Thinking ends after this many tokens; -1: no limit." },
    ],
  },
];

export const PARAMETERS = GROUPS.flatMap(({ parameters }) => parameters);
