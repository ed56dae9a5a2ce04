// The parameters of sampling that have a control, by group, in the order in which the server applies them.

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
      {
        name: "temperature", label: "Temperature", kind: "slider", min: 0, max: 2, step: 0.05, fallback: 1,
        hint: "0 always takes the likeliest token, 1 follows the model's own probabilities, more makes rare tokens likelier.",
      },
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
    parameters: [
      {
        name: "min_p", label: "Min-p", kind: "slider", min: 0, max: 1, step: 0.01, fallback: 0,
        hint: "Keeps tokens that are at least this fraction as likely as the likeliest one: few where the model is sure, many where it is not.",
      },
      { name: "top_k", label: "Top-k", kind: "slider", min: 0, max: 200, step: 1, fallback: 0, hint: "Keeps this many of the likeliest tokens; 0 keeps all." },
      {
        name: "top_p", label: "Top-p", kind: "slider", min: 0, max: 1, step: 0.01, fallback: 1,
        hint: "Keeps the likeliest tokens until their probabilities add up to this, so that the long tail of odd tokens is never chosen.",
      },
      {
        name: "typical_p", label: "Typical-p", kind: "slider", min: 0.01, max: 1, step: 0.01, fallback: 1,
        hint: "Keeps the tokens that are about as surprising as is usual here, until their probabilities add up to this.",
      },
      {
        name: "top_n_sigma", label: "Top-n-sigma", kind: "slider", min: 0, max: 5, step: 0.1, fallback: 0,
        hint: "Keeps tokens whose logits are within this many standard deviations of the largest; 0 keeps all. Works alike at any temperature.",
      },
      {
        name: "xtc_probability", label: "XTC probability", kind: "slider", min: 0, max: 1, step: 0.01, fallback: 0,
        hint: "How often XTC removes the likeliest tokens, which makes the text less predictable. 0: never.",
      },
      {
        name: "xtc_threshold", label: "XTC threshold", kind: "slider", min: 0, max: 1, step: 0.01, fallback: 0.1,
        hint: "XTC removes all tokens that are at least this likely, except the least likely of them.",
      },
    ],
  },
  {
    title: "Repetition",
    parameters: [
      {
        name: "repetition_penalty", label: "Repetition penalty", kind: "slider", min: 0.5, max: 2, step: 0.01, fallback: 1,
        hint: "Above 1, tokens that are in the prompt or in the answer become less likely; below 1, likelier.",
      },
      {
        name: "presence_penalty", label: "Presence penalty", kind: "slider", min: -2, max: 2, step: 0.05, fallback: 0,
        hint: "Subtracted once from the logit of each token that is in the answer: new subjects become likelier.",
      },
      {
        name: "frequency_penalty", label: "Frequency penalty", kind: "slider", min: -2, max: 2, step: 0.05, fallback: 0,
        hint: "Subtracted from a token's logit for each time that it is in the answer: the more often, the less likely.",
      },
      { name: "repeat_last_n", label: "Penalties look back", kind: "number", min: -1, fallback: -1, hint: "How many of the last tokens these penalties consider; -1: all." },
      {
        name: "dry_multiplier", label: "DRY", kind: "slider", min: 0, max: 5, step: 0.05, fallback: 0,
        hint: "Makes tokens less likely that would go on repeating a sequence that was there before. 0: off; 0.8 is usual.",
      },
      { name: "dry_base", label: "DRY base", kind: "slider", min: 1, max: 4, step: 0.05, fallback: 1.75, hint: "How fast DRY's penalty grows with the length of the repetition." },
      { name: "dry_allowed_length", label: "DRY allowed length", kind: "slider", min: 1, max: 20, step: 1, fallback: 2, hint: "Repetitions up to this many tokens cost nothing." },
      { name: "dry_penalty_last_n", label: "DRY looks back", kind: "number", min: -1, fallback: -1, hint: "How many of the last tokens are searched for repetitions; -1: all." },
      { name: "dry_sequence_breakers", label: "DRY breakers", kind: "lines", hint: "One a line. Repetitions do not extend across these texts." },
    ],
  },
  {
    title: "Mirostat",
    parameters: [
      {
        name: "mirostat", label: "Version", kind: "slider", min: 0, max: 2, step: 1, fallback: 0,
        hint: "1 and 2 keep the surprise of the text near a target, in place of all samplers except penalties, DRY and temperature. 0: off.",
      },
      { name: "mirostat_tau", label: "Target surprise", kind: "slider", min: 0, max: 10, step: 0.1, fallback: 5, hint: "In bits a token: lower is plainer, higher more varied." },
      { name: "mirostat_eta", label: "Learning rate", kind: "slider", min: 0, max: 1, step: 0.01, fallback: 0.1, hint: "How fast it corrects itself." },
    ],
  },
  {
    title: "Words and order",
    parameters: [
      { name: "bad_words", label: "Forbidden words", kind: "lines", hint: "One a line. They cannot appear in the answer." },
      { name: "logit_bias", label: "Logit bias", kind: "json", hint: 'Added to the logits of single tokens, from -100 (never) to 100 (always), by token id: {"42": -5}.' },
      {
        name: "samplers", label: "Order of samplers", kind: "lines",
        hint: "One a line; those that are left out are off. Empty: penalties, dry, top_n_sigma, temperature, min_p, top_k, typ_p, top_p, xtc.",
      },
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
